"""Fault 5: after sixty bad batches stock Keras never learns again, and kerasmp does."""

import keras
import numpy as np
import pytest
from helpers.marks import by_name
from helpers.stepping import Stock
from keras import ops

import kerasmp as mp

ON_JAX = keras.backend.backend() == "jax"
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.tanh(X[:, :1])
# A NaN loss, and a finite one, since tanh is finite, with gradients that are not.
BAD_LOSS, BAD_GRADIENTS = np.full_like(X, np.nan), X.copy()
BAD_GRADIENTS[:, 0] = np.inf
# The gradients at a scale of 1 are below the range of float16.
SMALL = 2.0**-26
FLOOR = 2.0**-14


def small_error(target, output):
    return SMALL * ops.mean(ops.square(ops.cast(target, "float32") - ops.cast(output, "float32")))


def loss_of(model):
    # Not test_on_batch, which in older Keras averages over all batches so far.
    return float(model.evaluate(X, Y, batch_size=len(X), verbose=0)) / SMALL


def trained(module, cls, bad, **settings):
    """Return the losses before and after the bad and good batches, the lowest scale, the model."""
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(8, activation="tanh", dtype="mixed_float16")
    last = keras.layers.Dense(1, dtype="mixed_float16")
    model = module.Sequential([keras.Input((4,)), hidden, last])
    inner = keras.optimizers.Adam(0.02, epsilon=1e-15)
    model.compile(cls(inner, **settings), small_error)
    before = loss_of(model)
    for _ in range(60):
        model.train_on_batch(bad, Y)
    lowest = float(ops.convert_to_numpy(model.optimizer.dynamic_scale.value))
    for _ in range(200):
        model.train_on_batch(X, Y)
    return before, loss_of(model), lowest, model


BAD = {"loss": BAD_LOSS, "gradients": BAD_GRADIENTS}


@pytest.mark.parametrize("bad", by_name(BAD, []))
def test_stock_keras_does_not_learn(bad):
    before, after, lowest, _ = trained(keras, Stock, bad)
    assert lowest == 2.0**-45
    assert after == before


@pytest.mark.parametrize("bad", by_name(BAD, ["gradients"]))
def test_a_kerasmp_model_learns(bad):
    before, after, lowest, model = trained(mp, mp.LossScaleOptimizer, bad)
    causes = {cause: n for cause, n in model.optimizer.skip_causes.items() if n}
    if bad is BAD_LOSS:
        assert (causes, lowest, model.optimizer.loss_scale) == ({"loss": 60}, 2.0**15, 2.0**15)
    else:
        assert (causes, lowest) == ({"gradients": 29, "floor": 31}, FLOOR)
        # A good step for each doubling up to 1, and then twenty.
        assert model.optimizer.loss_scale == 2.0**9
    assert after < before / 10


@pytest.mark.parametrize("bad", by_name(BAD, []))
def test_the_kerasmp_optimizer_in_a_stock_model_learns(bad):
    before, after, lowest, model = trained(keras, mp.LossScaleOptimizer, bad)
    assert lowest == (2.0**15 if bad is BAD_LOSS and not ON_JAX else FLOOR)
    assert model.optimizer.skipped_steps == 60
    assert after < before / 10


@pytest.mark.full
def test_without_the_recovery_the_floor_alone_is_not_enough():
    schedule = mp.DynamicLossScale(recovery_interval=None)
    before, after, lowest, model = trained(
        mp, mp.LossScaleOptimizer, BAD_GRADIENTS, loss_scale=schedule
    )
    assert lowest == model.optimizer.loss_scale == FLOOR
    assert after == before
