"""Marks for tests of numbers: the first way in which a backend runs is quick, the others full."""

import keras
import pytest
from helpers.gradients import WAYS

in_each_way = pytest.mark.parametrize(
    "mode", [*WAYS[:1], *(pytest.param(way, marks=pytest.mark.full) for way in WAYS[1:])]
)


def full_but(quick, names, *, where=True):
    """Return the names as parameters, of which only some are quick where that matters."""
    return [
        name if not where or name in quick else pytest.param(name, marks=pytest.mark.full)
        for name in names
    ]


def full_on(backend):
    """Return a mark for what is as quick elsewhere: JAX compiles each operation of an eager step."""
    here = keras.backend.backend() == backend
    return pytest.mark.full if here else lambda function: function
