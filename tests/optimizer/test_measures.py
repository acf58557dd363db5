"""What schedules may ask of a step's gradients, against counts that know the truth."""

import keras
import numpy as np
import pytest
from helpers.stepping import WAYS, tensors, variables_of
from keras import ops

from kerasmp.loss_scale import LossScale
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.optimizer.measures import gradient_max, underflow


def in_float16(values):
    """Return `values` as they come out of a float16 operation, in float32."""
    return np.asarray(values, "float16").astype("float32")


def estimate(*arrays):
    return float(underflow([ops.convert_to_tensor(a) for a in arrays], 1.0))


@pytest.mark.parametrize("spread", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("centre", [-21.0, -18.0, -15.0, -12.0])
def test_the_share_flushed_to_zero_is_estimated_within_a_factor_of_two(spread, centre):
    """Sizes of gradients spread like a normal distribution of their logarithm."""
    rng = np.random.default_rng(3)
    true = 2.0 ** rng.normal(centre, spread, size=100_000) * rng.choice([-1, 1], size=100_000)
    stored = in_float16(true)
    flushed = np.mean(stored == 0)
    assert estimate(stored) == pytest.approx(flushed, rel=1.0, abs=2e-4)
    assert estimate(stored) >= 0.5 * flushed - 2e-4


def test_true_zeros_far_from_the_limit_are_no_underflow():
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


def test_no_more_than_the_zeros_there_are():
    grid = np.float32(2.0**-24)
    assert estimate(np.array([grid] * 90 + [0.0] * 10, "float32")) == pytest.approx(0.1)


def test_the_largest_gradient_is_that_of_the_unscaled_loss():
    arrays = [ops.convert_to_tensor(np.array(a, "float32")) for a in ([[1.0, -8.0]], [4.0])]
    assert float(gradient_max(arrays, 4.0)) == 2.0


@keras.saving.register_keras_serializable("kerasmp_tests")
class Recording(LossScale):
    """Keeps the last measurements as its state."""

    measures = ("gradient_max", "underflow")
    initial_scale, min_scale, max_scale = 4.0, 1.0, 4.0

    def init(self):
        return {**super().init(), "seen_max": -1.0, "seen_underflow": -1.0}

    def update(self, state, finite, *, gradient_max, underflow):
        return {
            **state,
            "seen_max": ops.where(finite, gradient_max, state["seen_max"]),
            "seen_underflow": ops.where(finite, underflow, state["seen_underflow"]),
        }


@pytest.mark.parametrize("step", WAYS)
def test_a_schedule_gets_what_it_asks_for_and_nothing_of_a_bad_step(step):
    variables = variables_of([1.0, 2.0], [0.0])
    optimizer = LossScaleOptimizer("sgd", loss_scale=Recording())
    step(optimizer, tensors([2.0**-24, -8.0], [0.0]), variables)

    def seen():
        return float(optimizer.seen_max.numpy()), float(optimizer.seen_underflow.numpy())

    assert seen() == (2.0, pytest.approx(1 / 3))
    step(optimizer, tensors([np.inf, 1.0], [1.0]), variables)
    assert seen() == (2.0, pytest.approx(1 / 3))


@pytest.mark.backend("tensorflow")
def test_sparse_gradients_are_measured_by_what_they_hold():
    import tensorflow as tf

    variable = keras.Variable(np.ones((1000, 2), "float32"))
    optimizer = LossScaleOptimizer("sgd", loss_scale=Recording())
    gradient = tf.IndexedSlices(tf.constant([[16.0, 0.0]]), tf.constant([3]), (1000, 2))
    optimizer.apply([gradient], [variable])
    assert float(optimizer.seen_max.numpy()) == 4.0


def test_gradients_that_were_unscaled_by_hand_are_measured_alike():
    variables = variables_of([1.0, 2.0])
    optimizer = LossScaleOptimizer("sgd", loss_scale=Recording())
    optimizer.build(variables)
    grads = optimizer.get_unscaled_gradients(tensors([2.0**-24, -8.0]))
    optimizer.apply(grads, variables)
    assert float(optimizer.seen_max.numpy()) == 2.0
