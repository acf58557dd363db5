"""The optimizer's state of a schedule is what the schedule computes, in every way of stepping."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from helpers.stepping import WAYS, each_of, eager, graph, tensors, variables_of
from keras import ops

import kerasmp
from kerasmp.loss_scale import (
    DynamicLossScale,
    FixedLossScale,
    LogMaxLossScale,
    LossScale,
    NoLossScale,
    UnderflowLossScale,
)
from kerasmp.optimizer import LossScaleOptimizer

# Each setting that adds to the state or to the rule is used by one of them.
SCHEDULES = [
    DynamicLossScale(2.0**10, growth_interval=2),
    DynamicLossScale(2.0**10, growth_interval=3, recovery_interval=1),
    DynamicLossScale(2.0**10, growth_interval=2, recovery_interval=None),
    DynamicLossScale(
        2.0**10, growth_interval=3, hysteresis=2, consecutive_hysteresis=True, tolerance=0.3
    ),
    FixedLossScale(8.0),
    NoLossScale(),
    LogMaxLossScale(2.0**10),
    UnderflowLossScale(2.0**10, window=2, growth_interval=2),
]
# A run of overflows long enough for a slump, with steps before and after it.
STEPS = [1.0, 0.25, np.inf, 3.0, *[np.nan] * 10, 2.0, 1.0, 0.0, 4.0, np.inf, 1.0]
SMALL = 2.0**-24  # float16's smallest number, in each gradient


def _measured(value, scale):
    """Return the statistics of the gradients [value * scale, SMALL] of a good step."""
    return {
        "gradient_max": max(abs(value), SMALL / scale),
        # Only zeros can be flushed values.
        "underflow": 0.5 if value == 0 else 0.0,
    }


@each_of(WAYS, [graph] if graph in WAYS else [eager])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_state_in_the_optimizer_is_that_of_the_schedule(schedule, step):
    variables = variables_of([1.0, 2.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.0), loss_scale=schedule)
    optimizer.build(variables)
    state = schedule.init()
    for value in STEPS:
        scale = optimizer.loss_scale
        (gradient,) = tensors([value * scale, SMALL])
        finite = bool(np.isfinite(value))
        known = _measured(value, scale)
        measured = {name: known[name] if finite else 0.0 for name in schedule.measures}
        state = schedule.update(state, finite, **measured)
        step(optimizer, [gradient], variables)
        for key, wanted in state.items():
            held = getattr(optimizer, "dynamic_scale" if key == "scale" else key)
            wanted = ops.convert_to_numpy(wanted)  # noqa: PLW2901 - the same as a number
            # XLA may round sums differently; scales and counters are exact.
            exact = key in {"scale", "recover_to"} or wanted.dtype.kind in "iu"
            np.testing.assert_allclose(
                ops.convert_to_numpy(held.value),
                wanted,
                rtol=0 if exact else 1e-5,
                err_msg=key,
            )


def test_underflow_stops_where_the_gradients_are_seen():
    schedule = UnderflowLossScale(1.0, window=2)
    optimizer = LossScaleOptimizer("sgd", loss_scale=schedule)
    variables = variables_of(np.zeros(4000))
    true = np.random.default_rng(0).lognormal(np.log(2.0**-26), 2.0, size=4000)

    def flushed(scale):
        return np.mean(np.float16(true * scale) == 0)

    for _ in range(60):
        scale = optimizer.loss_scale
        eager(optimizer, tensors(np.float16(true * scale).astype("float32")), variables)
    assert flushed(1.0) > 0.4
    assert flushed(optimizer.loss_scale) < 0.002
    assert 2.0**9 <= optimizer.loss_scale <= 2.0**13  # and not the ceiling
    assert optimizer.skipped_steps == 0


@dataclasses.dataclass(frozen=True)
class CountingTwice(DynamicLossScale):
    """A user-defined rule that overrides a built-in one and does more than count."""

    def update(self, state, finite):
        after = super().update(state, finite)
        return {**after, "step_counter": after["step_counter"] + 1}


@each_of(WAYS)
def test_an_overridden_update_is_used_in_every_step(step):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=CountingTwice())
    variables = variables_of([1.0])
    for _ in range(3):
        step(optimizer, tensors([0.0]), variables)
    assert int(ops.convert_to_numpy(optimizer.step_counter)) == 6


class Telling(LossScale):
    """Not a dataclass, but it has `get_config`."""

    initial_scale = min_scale = max_scale = 8.0

    def get_config(self):
        return {}

    def update(self, state, finite):  # noqa: ARG002 - LossScale's
        return state


@pytest.mark.parametrize("own", [CountingTwice(), Telling()], ids=lambda own: type(own).__name__)
def test_a_user_defined_schedule_is_loaded_through_custom_objects(own):
    config = LossScaleOptimizer("sgd", loss_scale=own).get_config()
    again = LossScaleOptimizer.from_config(config, {type(own).__name__: type(own)})
    assert type(again.schedule) is type(own)
    assert again.schedule.get_config() == own.get_config()


def test_built_in_schedules_load_without_custom_objects():
    ours = (getattr(kerasmp.loss_scale, name) for name in kerasmp.loss_scale.__all__)
    schedules = {each for each in ours if isinstance(each, type) and issubclass(each, LossScale)}
    assert schedules == {LossScale, *map(type, SCHEDULES)}
    for schedule in SCHEDULES:
        data = json.loads(json.dumps(keras.saving.serialize_keras_object(schedule)))
        assert keras.saving.deserialize_keras_object(data) == schedule
