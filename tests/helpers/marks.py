"""Marks for the full set: for tests, whole files, and all but a few of many parameters."""

import keras
import pytest
from helpers.gradients import WAYS

_RUN = keras.backend.backend()
if _RUN == "tensorflow" and tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
    _RUN = "oldest"


def full(*values, **more):
    """Return values as a parameter that only the full set has."""
    return pytest.param(*values, marks=pytest.mark.full, **more)


def few(values, quick, *, where=True):
    """Return all values as parameters, of which the quick set has only some.

    Args:
        values: As in pytest, a tuple holds the values of several parameters.
        quick: The values of the quick set. One that is not among `values` is an error: otherwise a
            renamed case would silently leave the quick set.
        where: False if the quick set has all of them, for example on this backend.
    """
    values = list(values)
    _assert_known(quick, values)
    if not where:
        return values
    return [value if value in quick else full(*_several(value)) for value in values]


def by_name(values, quick):
    """Return the values of a dict as parameters; the quick set has those with the given names."""
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
    """Return marks that leave a file or a parameter to the full set in these runs only.

    Args:
        runs: Backends, or "oldest", an older Keras on TensorFlow. Each of them has three minutes
            for what can differ there; what is the same everywhere is quick on TensorFlow only.
    """
    return [pytest.mark.full] if _RUN in runs else []


def full_on(*runs):
    """Return such a mark for one test, which for example takes JAX seconds to compile."""
    return pytest.mark.full if marks_on(*runs) else lambda test: test


# For tests of numbers: the first way in which a backend runs a function is quick.
in_each_way = pytest.mark.parametrize("mode", few(WAYS, WAYS[:1]))
