"""Fixtures of the tests of OverflowMonitor."""

import warnings

import pytest

from kerasmp.errors import LossScaleWarning


@pytest.fixture
def warned():
    """Return a function that lists the loss-scale warnings so far; other warnings stay errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LossScaleWarning)
        yield lambda: [str(w.message) for w in caught if w.category is LossScaleWarning]
