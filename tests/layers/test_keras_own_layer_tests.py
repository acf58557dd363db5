"""Run Keras's tests of its layers on those of kerasmp: a subclass can do what its parent can.

What they skip on a backend stays skipped. Those that import TensorFlow run where it is installed.
"""

import importlib.util
import re
import sys
import types
from pathlib import Path
from unittest import TestCase, mock

import keras
import pytest
from helpers.replaced_layers import COUNTERPARTS

pytestmark = [
    pytest.mark.full,
    pytest.mark.backend("tensorflow", "jax"),
    # Some of them expect a warning, and others ignore one.
    pytest.mark.filterwarnings("default"),
]

KERAS = keras.src  # where the tests look for the layers
LAYERS = Path(KERAS.layers.__file__).parent
IMPORTED = ("grain", "tensorflow")  # imported by some of the files, and not needed by Keras


def files():
    """Return the test files, beside the layers, that use a layer with a kerasmp counterpart."""
    names = "|".join(stock.__name__ for stock in COUNTERPARTS)
    used = re.compile(rf"\.(?:{names})\b[(,]")
    found = [file for file in sorted(LAYERS.glob("*/*_test.py")) if used.search(file.read_text())]
    missing = "|".join(name for name in IMPORTED if importlib.util.find_spec(name) is None)
    fails = re.compile(rf"^(?:from|import) (?:{missing or 'nothing'})\b", re.MULTILINE)
    return [file for file in found if not fails.search(file.read_text())]


def cases(file):
    """Return the test cases of a file by name, with kerasmp layers in place of stock ones."""
    # Keras looks there for the classes that tests define and save.
    name = f"{KERAS.layers.__name__}.{file.parent.name}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    # Parameters of a test may be layers, which are looked up at import.
    with mock.patch.object(KERAS, "layers", _with_ours(KERAS.layers)):
        spec.loader.exec_module(module)
    for name, value in vars(module).items():
        if isinstance(value, types.ModuleType) and value.__name__.startswith(KERAS.layers.__name__):
            setattr(module, name, _with_ours(value))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, TestCase)
        and value.__module__ == module.__name__
    }


def _with_ours(module):
    """Return a copy of a module of Keras with counterparts in place of its classes."""
    copy = types.ModuleType(module.__name__)
    for name, value in vars(module).items():
        setattr(copy, name, COUNTERPARTS.get(value, value) if isinstance(value, type) else value)
    return copy


FILES = files()

for file in FILES:
    globals().update({f"{file.stem}_{name}": case for name, case in cases(file).items()})

if not importlib.util.find_spec("tensorflow"):
    delattr(globals()["dense_test_DenseTest"], "test_dense_sparse")  # imports it on any backend


def test_tests_of_keras_are_found():
    files = {file.stem for file in FILES}
    assert files > {"conv_test", "dense_test", "gru_test", "multi_head_attention_test"}
    assert len(files) >= 30
