"""What schedules meet on NumPy only: warnings of overflows that they are made for."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """Let numbers become inf and NaN without a word, as every framework does."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        yield
