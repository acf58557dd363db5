"""OverflowMonitor: when it warns, and what the warnings say."""

import keras
import numpy as np
import pytest
from helpers.marks import full, marks_on
from helpers.monitored import STOCK, batches, fit, make

from kerasmp.callbacks import OverflowMonitor
from kerasmp.errors import PolicyWarning
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("jax")


def test_a_healthy_run_is_silent(warned):
    schedule = DynamicLossScale(2.0**20)
    model = make(LossScaleOptimizer(keras.optimizers.SGD(0.01), loss_scale=schedule))
    fit(model, "b" * 9 + "g" * 6 + "b" * 9 + "g", [OverflowMonitor(1)], epochs=3)
    assert warned() == []


def test_a_streak_and_then_a_stall_give_one_warning_each(warned):
    model = make(LossScaleOptimizer("sgd", loss_scale=FixedLossScale(8)))
    fit(model, "g" + "b" * 80, [OverflowMonitor(5, streak=10, stalled=50)], epochs=2)
    streak, stalled = warned()
    assert streak.startswith("The last 14 training steps were skipped")
    assert "the loss scale is now 8." in streak
    assert stalled.startswith("Training has stalled: the last 54 steps were skipped")
    for message in (streak, stalled):
        assert "Gradients were inf or NaN in 1 of 1 layers: " in message
        assert 'only" (' in message
    assert "min_scale" not in stalled


def test_a_streak_at_the_floor_is_a_stall_at_once(warned):
    model = make(
        LossScaleOptimizer("sgd", loss_scale=DynamicLossScale(8.0, min_scale=2.0)), loss="mae"
    )
    fit(model, "h" * 10, [OverflowMonitor(3)])
    (message,) = warned()
    assert message.startswith("Training has stalled: the last 10 steps")
    assert "the loss scale is 2, and its schedule does not let it fall further." in message
    assert "take means. Or give the schedule a lower min_scale." in message


def test_a_streak_that_goes_below_one_names_sums(warned):
    def finite_without_a_gradient(_, output):
        return keras.ops.mean(keras.ops.sqrt(0.0 * output))

    optimizer = LossScaleOptimizer("sgd", loss_scale=DynamicLossScale(8.0))
    fit(make(optimizer, loss=finite_without_a_gradient), "g" * 10, [OverflowMonitor(3)])
    (message,) = warned()
    assert "the loss scale is now 0.0078125." in message
    assert message.startswith("The last 10 training steps were skipped")
    assert "If the loss is a sum over the batch" in message
    assert "min_scale" not in message


class Squares(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.square(y_true - y_pred)


@pytest.mark.parametrize(
    ("loss", "output", "name"),
    [
        (Squares(dtype="float16"), 3e4, "Squares"),  # its square is above 65504
        (lambda true, out: keras.ops.square(true - out), 9e4, "<lambda>"),
        ("mse", 9e4, "mse"),
    ],
)
@pytest.mark.parametrize("dtype", ["mixed_float16", "float32"])
@pytest.mark.filterwarnings("ignore::kerasmp.errors.PolicyWarning")  # of the float16 head
def test_a_loss_that_overflows_on_float16_outputs_is_named(loss, output, name, dtype, warned):
    model = make(LossScaleOptimizer("sgd"), dtype=dtype, loss=loss)
    model.layers[0].kernel.assign(np.ones((3, 1)))
    x = np.full((12, 3), output / 3 if dtype == "mixed_float16" else np.inf, "float32")
    model.fit(x, np.zeros((12, 1)), 1, verbose=0, callbacks=[OverflowMonitor(3)])
    (message,) = warned()
    is_named = f'The loss "{name}" may overflow on float16 outputs' in message
    assert is_named is (dtype == "mixed_float16")
    assert ("If that does not help" in message) is is_named


def test_each_fit_warns_anew(warned):
    model, monitor = make(), OverflowMonitor(streak=2)
    for _ in range(2):
        fit(model, "bbb", [monitor])
        fit(model, "ggg", [monitor])
    assert len(warned()) == 2


def test_only_the_layer_at_fault_is_named(warned):
    keras.utils.set_random_seed(2)
    inputs = [keras.Input((3,)), keras.Input((3,))]
    dense = keras.layers.Dense
    parts = [dense(1, use_bias=False, name=n)(i) for n, i in zip("pq", inputs, strict=True)]
    model = keras.Model(inputs, parts)
    model.compile(LossScaleOptimizer("sgd"), ["mse", "mse"])
    good, y = batches("g" * 4)
    huge = np.full_like(good, 1e30)  # its own gradient overflows, the other's does not
    model.fit([good, huge], [y, y], 1, verbose=0, callbacks=[OverflowMonitor(streak=4)])
    (message,) = warned()
    assert 'Gradients were inf or NaN in 1 of 2 layers: "q" (' in message


def test_the_stock_optimizer_names_no_layer(warned):
    fit(make(STOCK(keras.optimizers.SGD())), "g" + "b" * 12, [OverflowMonitor(1)])
    (message,) = warned()
    assert message.startswith("The last 10 training steps were skipped")
    assert "Gradients were inf" not in message


@pytest.mark.parametrize("optimizer", [LossScaleOptimizer, full(STOCK)])
def test_a_good_step_between_two_looks_ends_the_streak(optimizer, warned):
    model = make(optimizer(keras.optimizers.SGD(0.1)))
    fit(model, ("b" * 7 + "g") * 4, [OverflowMonitor(1, streak=8)])
    assert warned() == []


def head(activation=None, dtype="mixed_float16"):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(1, dtype=dtype, activation=activation)]
    )
    model.compile(LossScaleOptimizer("sgd"), "mse")
    return model


def test_findings_of_lint_are_reported_when_training_begins():
    x = np.ones((2, 3), "float32")
    monitor = OverflowMonitor()
    model = head("sigmoid")
    with pytest.warns(PolicyWarning, match="float16-head") as caught:
        model.fit(x, x[:, :1], verbose=0, callbacks=[monitor])
    assert sum(each.category is PolicyWarning for each in caught) == 1
    model.fit(x, x[:, :1], verbose=0, callbacks=[monitor])  # once: a second warning would raise
    with pytest.warns(PolicyWarning, match="float16-head"):
        model.fit(x, x[:, :1], verbose=0, callbacks=[OverflowMonitor()])
