"""Marks for tests of numbers: the first way in which a backend runs is quick, the others full."""

import keras
import pytest
from helpers.gradients import WAYS

FULL = pytest.mark.full


def full(*values):
    """Return a parameter that only the full tests have."""
    return pytest.param(*values, marks=FULL)


in_each_way = pytest.mark.parametrize("mode", [*WAYS[:1], *map(full, WAYS[1:])])


def full_but(quick, names, *, where=True):
    """Return the names as parameters, of which only some are quick where that matters."""
    return [name if not where or name in quick else full(name) for name in names]


def full_on(backend):
    """Return a mark for what is quick elsewhere: JAX compiles each operation of an eager step."""
    here = keras.backend.backend() == backend
    return FULL if here else lambda function: function


# For a file whose promises are kept by the same code elsewhere, and whose layers are measured on
# JAX by test_hazards.py and test_every_layer.py.
FULL_ON_JAX = [FULL] if keras.backend.backend() == "jax" else []
