"""TensorFlow checkpoints of other optimizers, and one that is restored more than once."""

import keras
import numpy as np
import pytest
from helpers.stepping import Stock, assert_same_bits, eager, numpy, tensors, variables_of

from kerasmp.loss_scale import DynamicLossScale
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = pytest.mark.backend("tensorflow")

SCALE = 2.0**10


def stepped(optimizer, *gradients):
    """Return the optimizer after these steps, and its variables."""
    variables = variables_of([1.0, 2.0])
    optimizer.build(variables)
    for gradient in gradients:
        eager(optimizer, tensors([gradient, 1.0]), variables)
    return optimizer, variables


def ours(**settings):
    schedule = DynamicLossScale(8.0, hysteresis=2, **settings)
    return LossScaleOptimizer(keras.optimizers.Adam(0.1), loss_scale=schedule)


def checkpoint(optimizer):
    import tensorflow as tf

    return tf.train.Checkpoint(optimizer=optimizer)


@pytest.mark.parametrize("built_first", [True, False])
def test_a_checkpoint_of_the_stock_wrapper_restores(built_first, tmp_path):
    """Restored by position: the variables of stock Keras come first, in the same order."""
    stock = Stock(keras.optimizers.Adam(0.1), initial_scale=SCALE)
    stepped(stock, 1.0, np.inf, 1.0, 1.0)
    path = checkpoint(stock).save(tmp_path / "stock")
    optimizer = ours()
    if built_first:
        stepped(optimizer)
    checkpoint(optimizer).restore(path)
    stepped(optimizer)
    assert optimizer.loss_scale == SCALE / 2
    assert int(optimizer.step_counter) == 2
    assert int(optimizer.iterations) == 3
    assert int(optimizer.hysteresis_left) == 2  # which stock Keras does not have
    inner = optimizer.inner_optimizer.variables
    assert_same_bits(numpy(inner), numpy(stock.inner_optimizer.variables))


@pytest.mark.parametrize("built_first", [True, False])
def test_a_checkpoint_of_a_plain_optimizer_restores_into_the_inner_one(built_first, tmp_path):
    plain, _ = stepped(keras.optimizers.Adam(0.1), 1.0, 2.0)
    path = checkpoint(plain).save(tmp_path / "plain")
    optimizer = ours()
    if built_first:
        stepped(optimizer)
    checkpoint(optimizer.inner_optimizer).restore(path)
    stepped(optimizer)
    assert (int(optimizer.iterations), optimizer.loss_scale) == (2, 8.0)
    assert_same_bits(numpy(optimizer.inner_optimizer.variables), numpy(plain.variables))


def test_a_checkpoint_of_the_inner_optimizer_restores_into_a_plain_one(tmp_path):
    optimizer, _ = stepped(ours(), 1.0, 2.0)
    path = checkpoint(optimizer.inner_optimizer).save(tmp_path / "inner")
    plain, _ = stepped(keras.optimizers.Adam(0.1))
    checkpoint(plain).restore(path).assert_existing_objects_matched()
    assert_same_bits(numpy(plain.variables), numpy(optimizer.inner_optimizer.variables))


def test_a_checkpoint_can_be_restored_twice(tmp_path):
    optimizer, variables = stepped(ours(), 1.0, np.inf, np.inf)
    saved = optimizer.get_weights()
    whole = checkpoint(optimizer)
    path = whole.save(tmp_path / "point")
    for _ in range(2):
        eager(optimizer, tensors([np.nan, 1.0]), variables)
        eager(optimizer, tensors([1.0, 1.0]), variables)
        assert optimizer.get_weights()[4].tolist() != saved[4].tolist()
        whole.restore(path).assert_consumed()
        assert_same_bits(optimizer.get_weights(), saved)
