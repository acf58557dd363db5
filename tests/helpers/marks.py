"""What is left to the full set: tests, whole files, and all but a few of many values."""

import keras
import pytest
from helpers.gradients import WAYS

_RUN = keras.backend.backend()
if _RUN == "tensorflow" and tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
    _RUN = "oldest"


def full(*values, **more):
    """Return the values of a case that only the full set has, as parameters."""
    return pytest.param(*values, marks=pytest.mark.full, **more)


def few(values, quick, *, where=True):
    """Return all of the values as parameters, of which the quick set has only some.

    Args:
        values: A tuple holds the values of several parameters, as in pytest.
        quick: Those of the quick set. One that is not among `values` is an error: a case with a new
            name would otherwise leave the quick set, and nobody would see it.
        where: False if the quick set has all of them, on this backend say.
    """
    values = list(values)
    _assert_known(quick, values)
    if not where:
        return values
    return [value if value in quick else full(*_several(value)) for value in values]


def by_name(values, quick):
    """Return the values of a dict as parameters, of which the quick set has those of some names."""
    _assert_known(quick, values)
    return [
        pytest.param(*_several(value), id=name, marks=() if name in quick else pytest.mark.full)
        for name, value in values.items()
    ]


def _assert_known(quick, values):
    unknown = [each for each in quick if each not in values]
    assert not unknown, f"Not among the values: {unknown}"


def _several(value):
    return value if isinstance(value, tuple) else (value,)


def marks_on(*runs):
    """Return the marks of what is full in these runs alone: for a file, or a parameter.

    Args:
        runs: Backends, or "oldest", an older Keras on TensorFlow. Each of them has three minutes
            for what can differ there; what is the same everywhere is quick on TensorFlow alone.
    """
    return [pytest.mark.full] if _RUN in runs else []


def full_on(*runs):
    """Return the same for one test. JAX, say, compiles for seconds what the others just run."""
    return pytest.mark.full if marks_on(*runs) else lambda test: test


# A test of numbers: the first way in which a backend runs them is quick.
in_each_way = pytest.mark.parametrize("mode", few(WAYS, WAYS[:1]))
