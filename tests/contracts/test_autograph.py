"""AutoGraph, which rewrites what a user's `tf.function` calls, leaves the code of kerasmp alone."""

import traceback

import keras
import pytest
from keras import ops

import kerasmp as mp

pytestmark = pytest.mark.backend("tensorflow")

LOOP = "tf__step"  # the user's own function
OFF = "tf__wrapper"  # in which TensorFlow turns AutoGraph off for a callable object


def rewritten():
    """Return the functions written by AutoGraph that have led here."""
    stack = traceback.extract_stack()
    return [frame.name for frame in stack if "__autograph_generated" in frame.filename]


class Noting(keras.optimizers.SGD):
    """Notes it for an update."""

    def update_step(self, *args):
        self.seen = rewritten()
        super().update_step(*args)


class Value:
    """Notes it where it becomes a tensor."""

    dtype = "float32"

    def __tf_tensor__(self, dtype=None, name=None):
        self.seen = rewritten()
        return ops.ones((2,), dtype)


@pytest.mark.parametrize("applying", ["apply", "apply_gradients"])
def test_an_optimizer_step_in_a_user_defined_loop(applying):
    import tensorflow as tf

    inner, variable, loss, gradient = Noting(), keras.Variable([1.0, 2.0]), Value(), Value()
    optimizer = mp.LossScaleOptimizer(inner)
    optimizer.build([variable])

    @tf.function
    def step():
        optimizer.scale_loss(loss)
        (unscaled,) = optimizer.get_unscaled_gradients([gradient])
        if applying == "apply":
            optimizer.apply([unscaled], [variable])
        else:
            optimizer.apply_gradients([(unscaled, variable)])

    step()
    for each in (inner, loss, gradient):
        assert set(each.seen) <= {LOOP, "if_body", "else_body"}
        assert LOOP in each.seen


def test_a_model_in_a_user_defined_loop():
    import tensorflow as tf

    seen = []
    inputs = keras.Input((3,))
    noting = mp.layers.Dense(2, activation=lambda x: seen.append(rewritten()) or x)
    model = mp.Model(inputs, noting(inputs))

    @tf.function
    def step(x):
        return model(x)

    step(tf.ones((4, 3)))
    assert seen[-1] == [LOOP, OFF]
