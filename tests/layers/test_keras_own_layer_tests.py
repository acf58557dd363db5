"""Keras's own tests of its layers, run on ours: a subclass can do what its parent can.

What they skip on a backend stays skipped. Those that import TensorFlow run where it is installed.
"""

import importlib.util

import pytest
from helpers import keras_own

pytestmark = [
    pytest.mark.full,
    pytest.mark.backend("tensorflow", "jax"),
    # Some of them ask for a warning, and others do not mind one.
    pytest.mark.filterwarnings("default"),
]

FILES = keras_own.files()

for file in FILES:
    globals().update({f"{file.stem}_{name}": case for name, case in keras_own.cases(file).items()})

if not importlib.util.find_spec("tensorflow"):
    delattr(globals()["dense_test_DenseTest"], "test_dense_sparse")  # imports it on any backend


def test_they_are_found():
    files = {file.stem for file in FILES}
    assert files > {"conv_test", "dense_test", "gru_test", "multi_head_attention_test"}
    assert len(files) >= 30
