"""The statistics of gradients that schedules may request, against counts that know the truth."""

import numpy as np
import pytest
from keras import ops

from kerasmp.optimizer.gradient_statistics import gradient_max, underflow

pytestmark = pytest.mark.unit


def in_float16(values):
    """Return `values`, rounded to float16, in float32."""
    return np.asarray(values, "float16").astype("float32")


def estimate(*arrays):
    return float(underflow([ops.convert_to_tensor(a) for a in arrays], 1.0))


@pytest.mark.parametrize("spread", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("centre", [-21.0, -18.0, -15.0, -12.0])
def test_the_share_flushed_to_zero_is_estimated_within_a_factor_of_two(spread, centre):
    """Magnitudes of gradients with a log-normal distribution."""
    rng = np.random.default_rng(3)
    true = 2.0 ** rng.normal(centre, spread, size=100_000) * rng.choice([-1, 1], size=100_000)
    stored = in_float16(true)
    flushed = np.mean(stored == 0)
    assert estimate(stored) == pytest.approx(flushed, rel=1.0, abs=2e-4)
    assert estimate(stored) >= 0.5 * flushed - 2e-4


def test_zeros_far_from_the_limit_are_not_counted_as_underflow():
    """Half of a ReLU's gradients are zero, and none of them was flushed."""
    values = np.random.default_rng(0).normal(size=10_000).astype("float32")
    assert estimate(np.where(values > 0, values, 0)) == 0.0


def test_all_zeros_count_as_flushed_and_none_as_not():
    assert estimate(np.zeros(8, "float32")) == 1.0
    assert estimate(np.ones(8, "float32")) == 0.0


def test_several_arrays_count_as_one():
    rng = np.random.default_rng(1)
    values = in_float16(2.0 ** rng.normal(-20, 3, size=(4, 1000)))
    assert estimate(*values) == pytest.approx(estimate(values))


def test_the_estimate_is_at_most_the_share_of_zeros():
    grid = np.float32(2.0**-24)
    assert estimate(np.array([grid] * 90 + [0.0] * 10, "float32")) == pytest.approx(0.1)


def test_the_largest_gradient_is_that_of_the_unscaled_loss():
    arrays = [ops.convert_to_tensor(np.array(a, "float32")) for a in ([[1.0, -8.0]], [4.0])]
    assert float(gradient_max(arrays, 4.0)) == 2.0
