"""The statistics that a schedule requests reach it, in every way of stepping."""

import keras
import numpy as np
import pytest
from helpers.stepping import WAYS, each_of, tensors, variables_of
from keras import ops

from kerasmp.loss_scale import LossScale
from kerasmp.optimizer import LossScaleOptimizer


@keras.saving.register_keras_serializable("kerasmp_tests")
class Recording(LossScale):
    """Keeps the last statistics as its state."""

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


@each_of(WAYS)
def test_a_schedule_gets_the_statistics_it_asks_for_except_in_bad_steps(step):
    variables = variables_of([1.0, 2.0], [0.0])
    optimizer = LossScaleOptimizer("sgd", loss_scale=Recording())
    step(optimizer, tensors([2.0**-24, -8.0], [0.0]), variables)

    def seen():
        return float(optimizer.seen_max.numpy()), float(optimizer.seen_underflow.numpy())

    assert seen() == (2.0, pytest.approx(1 / 3))
    step(optimizer, tensors([np.inf, 1.0], [1.0]), variables)
    assert seen() == (2.0, pytest.approx(1 / 3))


@pytest.mark.backend("tensorflow")
def test_sparse_gradients_are_measured_by_their_values():
    import tensorflow as tf

    variable = keras.Variable(np.ones((1000, 2), "float32"))
    optimizer = LossScaleOptimizer("sgd", loss_scale=Recording())
    gradient = tf.IndexedSlices(tf.constant([[16.0, 0.0]]), tf.constant([3]), (1000, 2))
    optimizer.apply([gradient], [variable])
    assert float(optimizer.seen_max.numpy()) == 4.0


def test_manually_unscaled_gradients_give_the_same_statistics():
    variables = variables_of([1.0, 2.0])
    optimizer = LossScaleOptimizer("sgd", loss_scale=Recording())
    optimizer.build(variables)
    grads = optimizer.get_unscaled_gradients(tensors([2.0**-24, -8.0]))
    optimizer.apply(grads, variables)
    assert float(optimizer.seen_max.numpy()) == 2.0
