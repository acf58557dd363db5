"""A wrapped `MultiOptimizer`: one scale and one decision for all of its optimizers.

Fault 17: `LearningRateScheduler` and `ReduceLROnPlateau` find its optimizers as without a wrapper.
"""

import keras
import numpy as np
import pytest
from helpers.marks import by_name, few, full_on
from helpers.stepping import EXACT_WAYS, Stock, assert_same_bits, each_of, numpy
from helpers.twins import Twins

import kerasmp as mp
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = pytest.mark.keras("3.15.1")

SETTINGS = [
    {},
    {"use_ema": True, "clipnorm": 0.5},
    {"use_ema": True, "gradient_accumulation_steps": 2},
]
X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X[:, :1] * 2 - 1


def several(rate=0.05, **settings):
    """Return an Adam for kernels, or another pattern, and an SGD for the other variables."""
    adam = keras.optimizers.Adam(rate, **settings)
    sgd = keras.optimizers.SGD(rate, momentum=0.9)
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(sgd, {".*(kernel|v0|v2)": adam})
    )


@each_of(EXACT_WAYS)
@pytest.mark.parametrize("settings", few(SETTINGS, SETTINGS[-1:]), ids=str)
def test_equals_the_unwrapped_one_and_skips_for_all_at_once(settings, step):
    twins = Twins(lambda _: several(**settings), step)
    twins.bad(np.inf)
    for seed in range(5):
        twins.good(seed)
        twins.bad()
    twins.check()
    assert (twins.wrapped.applied_steps, twins.wrapped.skipped_steps) == (5, 6)
    assert twins.wrapped.nonfinite_counts.tolist() == [6, 0, 0, 0]
    assert twins.wrapped.accumulated_steps == (
        1 if "gradient_accumulation_steps" in settings else None
    )


def test_only_a_wrapper_around_several_has_optimizers():
    wrapped = LossScaleOptimizer(several())
    assert wrapped.optimizers is wrapped.inner_optimizer.optimizers
    assert len(wrapped.optimizers) == 2
    assert not hasattr(LossScaleOptimizer("sgd"), "optimizers")
    assert not hasattr(wrapped, "learning_rate")


def fitted(optimizer, callbacks, epochs=4):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    logs = model.fit(
        X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    ).history
    # The name of each optimizer ends in another number.
    rates = [values for name, values in logs.items() if name.startswith("learning_rate_")]
    return numpy(model.variables), logs["loss"], rates


CALLBACKS = {
    "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(
        lambda epoch, rate: rate if epoch < 2 else rate / 2
    ),
    "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.5, patience=1, min_delta=100.0
    ),
}


@pytest.mark.parametrize("callback", by_name(CALLBACKS, ["ReduceLROnPlateau"]))
@full_on("jax")
def test_learning_rate_callbacks_reach_every_optimizer_inside(callback):
    weights, losses, rates = fitted(LossScaleOptimizer(several(), loss_scale=2.0**12), [callback()])
    expected, expected_losses, expected_rates = fitted(several(), [callback()])
    assert_same_bits(weights, expected)
    assert losses == expected_losses
    assert rates == expected_rates
    assert len(rates) == 2
    assert all(values[-1] < values[0] for values in rates)


@pytest.mark.full
@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
def test_learning_rate_callbacks_fail_in_stock_keras(callback):
    with pytest.raises((ValueError, AttributeError), match=r"(?i)learning.rate"):
        fitted(Stock(several()), [callback()])


@pytest.mark.full
def test_averages_are_swapped_where_an_optimizer_has_them():
    def swapped(optimizer):
        callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
        return fitted(optimizer, callbacks)[0]

    ours = swapped(LossScaleOptimizer(several(use_ema=True), loss_scale=2.0**12))
    assert_same_bits(ours, swapped(several(use_ema=True)))


def test_a_file_brings_the_state_of_all_of_them_back(tmp_path):
    keras.utils.set_random_seed(0)
    model = mp.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = LossScaleOptimizer(several(), loss_scale=mp.DynamicLossScale(2.0**10))
    model.compile(optimizer, "mse")
    x = X.copy()
    x[-1] = 5e18  # a finite loss whose gradient overflows
    model.fit(x, Y, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (loaded.optimizer.applied_steps, loaded.optimizer.skipped_steps) == (3, 1)
    assert loaded.optimizer.loss_scale == 2.0**9
    assert_same_bits(numpy(loaded.optimizer.variables), numpy(model.optimizer.variables))
    for going_on in (model, loaded):
        going_on.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    assert_same_bits(numpy(loaded.variables), numpy(model.variables))
