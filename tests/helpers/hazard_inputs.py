"""Functions that make inputs for the layers of `helpers.hazards` from a NumPy generator.

A hazard rounds these inputs to the half precision that it is measured in.
"""

import numpy as np


def normal(*shapes, std=1.0, mean=0.0):
    """Return a maker of arrays of normally distributed numbers."""

    def make(random):
        return [random.normal(size=s) * std + mean for s in shapes]

    return make


def spread(low, high, count=4000):
    """Return a maker of one array with values from `low` to `high`."""

    def make(_):
        return [np.linspace(low, high, count)[None]]

    return make


def beside(make, *others):
    """Return a maker that adds arrays without floats."""
    return lambda random: [*make(random), *(other(random) for other in others)]


def labels(random):
    return random.integers(0, 1000, 64).astype("int32")


def targets(random):
    return random.integers(0, 2, (64, 8)).astype("int32")


def half_masked(random):
    """Return a random mask whose first row is all False."""
    mask = random.random((4, 2000)) < 0.5
    mask[0] = False
    return mask


def no_row(_):
    mask = np.ones((2, 16), bool)
    mask[0] = False
    return mask


def opposite(random):
    """Return queries and values whose products are far below zero."""
    return [normal((2, 16, 64), mean=mean)(random)[0] for mean in (4, -4)]


def with_a_row_of_zeros(shape):
    """Return a maker of one array of normally distributed numbers whose third row is zero."""

    def make(random):
        (x,) = normal(shape, std=60)(random)
        x[2] = 0
        return [x]

    return make


def some(_):
    """Return a mask that is True for the first eight of sixteen steps."""
    return np.arange(32).reshape(2, 16) % 16 < 8


def often(random):
    """Return ids of which one occurs 4096 times."""
    return [random.permutation([0] * 4096 + [1] * 8 + [2]).reshape(5, 821).astype("int32")]
