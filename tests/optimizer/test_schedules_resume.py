"""Each schedule continues from a `.keras` file bit for bit."""

import dataclasses

import keras
import pytest
from helpers.marks import few
from helpers.resuming import END, STOP, everything, network, train
from helpers.stepping import BACKEND, assert_same_bits
from keras import ops

import kerasmp as mp


@keras.saving.register_keras_serializable(package="tests")
@dataclasses.dataclass(frozen=True)
class Drifting(mp.LossScale):
    """A user-defined schedule with a float and an integer in its state beside the usual two."""

    initial_scale: float = 2.0**10
    min_scale: float = 1.0
    max_scale: float = 2.0**24

    def init(self):
        return {**super().init(), "drift": 1.0, "overflows": 0}

    def update(self, state, finite):
        state = {key: ops.convert_to_tensor(value) for key, value in state.items()}
        drift = ops.where(finite, state["drift"] * 1.125, state["drift"] / 3.0)
        return {
            "scale": self.bounded(state["scale"] * drift),
            "step_counter": state["step_counter"] + 1,
            "drift": drift,
            "overflows": ops.where(finite, state["overflows"], state["overflows"] + 1),
        }


# Each with the entries of its state that must have changed when training stops.
SCHEDULES = {
    # It came back after the first overflow, and not after the second.
    "recovering": (mp.DynamicLossScale(0.5), {"scale", "step_counter", "recover_to"}),
    "tolerant": (
        mp.DynamicLossScale(2.0**10, tolerance=0.45, growth_interval=3),
        {"step_counter", "steps_since_change", "overflows_since_change"},
    ),
    "log max": (
        mp.LogMaxLossScale(2.0**10),
        {"scale", "mean", "mean_weight", "slow_mean", "square", "slow_weight"},
    ),
    "underflow": (
        mp.UnderflowLossScale(2.0**10, window=2, max_underflow=0.0, growth_interval=2),
        {"scale", "step_counter", "steps_to_wait"},
    ),
    "of the user": (Drifting(), {"scale", "drift", "overflows"}),
}


# The one with the most state, and one that needs no code of kerasmp.
QUICK = ["of the user"] if BACKEND == "jax" else ["recovering", "of the user"]


def held(optimizer, key):
    variable = getattr(optimizer, "dynamic_scale" if key == "scale" else key)
    return ops.convert_to_numpy(variable.value)


def compiled(schedule):
    model = network()
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=schedule)
    model.compile(optimizer, keras.losses.MeanSquaredError())
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize("name", few(SCHEDULES, QUICK))
def test_training_continues_bit_for_bit(name, tmp_path):
    schedule, moving = SCHEDULES[name]
    model = train(compiled(schedule), 0, STOP)
    start = schedule.init()
    assert {k for k in start if held(model.optimizer, k) != start[k]} >= moving
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert resumed.optimizer.schedule == schedule
    assert_same_bits(everything(resumed), everything(model))
    for going_on in (resumed, model):
        train(going_on, STOP, END)
    assert_same_bits(everything(resumed), everything(model))
