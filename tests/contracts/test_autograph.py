"""AutoGraph, which rewrites what a user's `tf.function` calls, leaves kerasmp as it is written."""

import traceback

import keras
import pytest
from keras import ops

import kerasmp as mp

pytestmark = pytest.mark.backend("tensorflow")


class Noting(keras.optimizers.SGD):
    """Notes which functions that AutoGraph has written lead to an update."""

    def update_step(self, *args):
        self.rewritten = _rewritten()
        super().update_step(*args)


def _rewritten():
    stack = traceback.extract_stack()
    return {frame.name for frame in stack if "__autograph_generated" in frame.filename}


def test_nothing_of_ours_is_rewritten_in_a_loop_of_the_users_own():
    import tensorflow as tf

    seen = []
    inputs = keras.Input((3,))
    model = mp.Model(
        inputs, mp.layers.Dense(2, activation=lambda x: seen.append(_rewritten()) or x)(inputs)
    )
    inner = Noting()
    optimizer = mp.LossScaleOptimizer(inner)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(ops.mean(model(x, training=True)))
        grads = tape.gradient(loss, model.trainable_variables)
        grads = optimizer.get_unscaled_gradients(grads)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    step(tf.ones((4, 3)))
    assert inner.rewritten == {"tf__step"}  # the loop itself
    assert seen[-1] == {"tf__step", "tf__wrapper"}  # and what turns AutoGraph off in `__call__`
