"""DynamicLossScale against a second implementation, and every value that it refuses."""

import dataclasses
from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import DynamicLossScale

LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)


class Machine:
    """The rule in plain float32 arithmetic, written without a look at kerasmp's."""

    def __init__(self, s):
        self.s = s
        self.scale = np.float32(s.initial_scale)
        self.quiet = 0
        self.allowance = s.hysteresis

    def step(self, finite):
        with np.errstate(over="ignore", under="ignore"):
            if not finite:
                self.quiet = 0
                self.allowance = max(0, self.allowance - 1)
                if self.allowance == 0:
                    lower = self.scale * np.float32(self.s.backoff_factor)
                    self.scale = max(lower, np.float32(self.s.min_scale))
                return
            self.quiet += 1
            if self.quiet == self.s.growth_interval:
                higher = self.scale * np.float32(self.s.growth_factor)
                self.scale = min(higher, np.float32(self.s.max_scale))
                self.quiet = 0
                self.allowance = self.s.hysteresis

    def state(self):
        return {
            "scale": float(self.scale),
            "step_counter": self.quiet,
            "hysteresis_left": self.allowance,
        }


@st.composite
def schedules(draw):
    scale = st.floats(TINY, LARGEST, width=32)
    low, first, high = sorted(draw(st.tuples(scale, scale, scale)))
    return DynamicLossScale(
        initial_scale=first,
        min_scale=low,
        max_scale=high,
        growth_factor=draw(st.sampled_from([2, 1.5, 1.0001, 4.0, 2.0**60])),
        backoff_factor=draw(st.sampled_from([0.5, 0.75, 0.9999, 0.125, 2.0**-60])),
        growth_interval=draw(st.integers(1, 4)),
        hysteresis=draw(st.integers(1, 3)),
    )


def _numbers(state):
    return {key: ops.convert_to_numpy(value).item() for key, value in state.items()}


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(), steps=st.lists(st.booleans(), max_size=20))
@example(DynamicLossScale(), [False] * 20)
@example(DynamicLossScale(growth_interval=1), [True] * 12)
@example(DynamicLossScale(growth_interval=1, initial_scale=LARGEST, max_scale=LARGEST), [True])
@example(DynamicLossScale(hysteresis=2, growth_interval=2), [False, True, False, True, True, False])
def test_follows_the_same_rule_as_an_independent_state_machine(schedule, steps):
    machine = Machine(schedule)
    state = schedule.init()
    assert state == machine.state()
    for finite in steps:
        machine.step(finite)
        state = schedule.update(state, finite)
        assert _numbers(state) == machine.state()
        assert schedule.min_scale <= _numbers(state)["scale"] <= schedule.max_scale


@settings(max_examples=50, deadline=None)
@given(schedule=schedules())
def test_any_settings_survive_serialisation(schedule):
    data = keras.saving.serialize_keras_object(schedule)
    assert keras.saving.deserialize_keras_object(data) == schedule
    assert DynamicLossScale.from_config(schedule.get_config()) == schedule


def test_the_defaults_are_the_documented_ones():
    assert dataclasses.asdict(DynamicLossScale()) == {
        "initial_scale": 32768.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "hysteresis": 1,
        "min_scale": 1.0,
        "max_scale": 16777216.0,
    }


SCALES = ("initial_scale", "min_scale", "max_scale")
COUNTS = ("growth_interval", "hysteresis")
NO_NUMBER = ["2", "", None, True, False, np.bool_(True), [2.0], 2j]
REFUSED = [
    *((n, v) for n in SCALES for v in [0, 0.0, -1, np.inf, -np.inf, np.nan, 1e-46, 1e39, 10**400]),
    *(("growth_factor", v) for v in [1, 1.0, 0.5, 0, -2, np.inf, np.nan, 10**400]),
    *(("backoff_factor", v) for v in [1, 1.5, 0, -0.5, np.inf, np.nan, -(10**400)]),
    *((n, v) for n in COUNTS for v in [0, -1, 2.5, 2**31, np.inf, np.nan, 10**400]),
    *((n, v) for n in (*SCALES, *COUNTS, "growth_factor", "backoff_factor") for v in NO_NUMBER),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda v: str(v)[:12])
def test_refuses_the_value_and_says_received_expected_and_fix(name, value):
    with pytest.raises(LossScaleError) as caught:
        DynamicLossScale(**{name: value})
    error = caught.value
    assert f"`{name}`" in str(error)
    assert error.received == repr(value)
    assert f"Received: {value!r}. Expected: a" in str(error)
    assert error.expected
    assert error.fix
    assert str(error).endswith(error.fix)


@pytest.mark.parametrize(
    "settings_",
    [
        {"initial_scale": 0.5},
        {"initial_scale": 2.0**25},
        {"min_scale": 2.0**16},
        {"max_scale": 2.0},
        {"min_scale": 8.0, "max_scale": 4.0, "initial_scale": 4.0},
    ],
)
def test_refuses_bounds_that_do_not_enclose_the_initial_scale(settings_):
    with pytest.raises(LossScaleError, match="min_scale <= initial_scale <= max_scale"):
        DynamicLossScale(**settings_)


@pytest.mark.parametrize("value", [1024, np.float32(1024), np.int64(1024), Fraction(1024)])
def test_any_real_number_type_is_stored_as_a_python_number(value):
    schedule = DynamicLossScale(initial_scale=value, growth_interval=value)
    assert (schedule.initial_scale, type(schedule.initial_scale)) == (1024.0, float)
    assert (schedule.growth_interval, type(schedule.growth_interval)) == (1024, int)


def test_scales_are_stored_as_the_float32_numbers_that_the_variable_will_hold():
    schedule = DynamicLossScale(initial_scale=1.1, min_scale=1.1, max_scale=1.1)
    state = _numbers(schedule.update(schedule.init(), finite=False))
    assert schedule.check(state["scale"]) == schedule.initial_scale == float(np.float32(1.1))
