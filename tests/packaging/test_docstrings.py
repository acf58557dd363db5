"""Public names have docstrings with examples, and the examples hold."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import types

import keras
import pytest
from helpers.marks import few

import kerasmp

EXAMPLE = (">>> ", "```python")
OPTIONAL = {"jinja2", "matplotlib", "rich", "sklearn", "tensorflow_datasets", "typer"}
FRAMEWORKS = {"tensorflow", "jax", "torch"}


def public(module):
    """Yield (dotted name, object) for all public names of a module and its submodules."""
    names = getattr(module, "__all__", [x for x in vars(module) if not x.startswith("_")])
    for name in names:
        thing = getattr(module, name)
        if isinstance(thing, types.ModuleType):
            yield from public(thing) if thing.__name__.startswith("kerasmp") else ()
        else:
            yield f"{module.__name__}.{name}", thing


@pytest.mark.unit
def test_every_public_name_has_a_docstring_with_an_example():
    bare = [
        name
        for name, thing in public(kerasmp)
        if inspect.isroutine(thing) or inspect.isclass(thing)
        if not (inspect.isclass(thing) and issubclass(thing, Exception))
        if not any(mark in (thing.__doc__ or "") for mark in EXAMPLE)
    ]
    assert not bare


@pytest.mark.unit
@pytest.mark.parametrize(
    ("package", "parts"),
    [
        (kerasmp.layers, ("Args:", "Output shape:")),
        (kerasmp.ops, ("Args:", "shape", "Returns:")),
    ],
)
def test_numerics_have_an_example_that_is_run_and_say_what_comes_in_and_out(package, parts):
    bare = [
        (name, part)
        for name, thing in public(package)
        for part in parts
        if not re.search(part, thing.__doc__ or "")
    ]
    assert not bare
    assert not [name for name, thing in public(package) if not is_run(thing)]


def is_run(thing):
    """Return whether an example of a module is run."""
    return f"{thing.__module__}.{thing.__name__}" in run(thing.__module__)


@functools.cache
def run(module):
    """Return the names in a module that have examples, as doctest finds them."""
    found = doctest.DocTestFinder().find(sys.modules[module])
    return {test.name for test in found if test.examples}


@pytest.mark.unit
def test_each_argument_of_a_function_is_explained():
    bare = [
        (name, argument)
        for name, thing in public(kerasmp.ops)
        for argument in inspect.signature(thing).parameters
        if not re.search(rf"^    (\*\*)?{argument}: \S", inspect.getdoc(thing), re.MULTILINE)
    ]
    assert not bare


@pytest.mark.unit
def test_every_public_exception_says_what_it_means():
    bare = [
        name
        for name, thing in public(kerasmp)
        if inspect.isclass(thing) and issubclass(thing, Exception)
        if not thing.__doc__
    ]
    assert not bare


def modules():
    """Return the package's modules that can be imported on the running backend.

    One backend is enough for most examples; the rest is left to the full set.
    """
    found = [module.name for module in pkgutil.walk_packages(kerasmp.__path__, "kerasmp.")]
    others = FRAMEWORKS - {keras.backend.backend()}
    here = ["kerasmp", *(name for name in found if not others & set(re.split(r"[._]", name)))]
    quick = [name for name in here if name.startswith("kerasmp.backend.")]
    return few(here, quick, where=keras.backend.backend() != "tensorflow")


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_hold(name):
    try:
        module = importlib.import_module(name)
    except (
        ImportError,
        SystemExit,
    ) as error:  # the command ends with a message after an ImportError
        cause = error if isinstance(error, ImportError) else error.__cause__ or error.__context__
        missing = (getattr(cause, "name", None) or "").partition(".")[0]
        if keras.backend.backend() == "tensorflow" or missing not in OPTIONAL:
            raise
        pytest.skip(f"{missing} is not installed")
    names = {"keras": keras, "mp": kerasmp} | {x: getattr(kerasmp, x) for x in kerasmp.__all__}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(module, globs=names | vars(module), optionflags=flags)
    assert not result.failed
