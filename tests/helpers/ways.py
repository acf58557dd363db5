"""Marks for tests of numbers: the first way in which a backend runs is quick, the others full."""

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
