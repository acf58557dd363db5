"""DynamicLossScale against a second implementation, and every value that it refuses."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import DynamicLossScale, LogMaxLossScale, UnderflowLossScale

pytestmark = pytest.mark.unit

LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)


class Machine:
    """The rule in plain float32 arithmetic, written independently of kerasmp."""

    def __init__(self, s):
        self.s = s
        self.scale = np.float32(s.initial_scale)
        self.quiet = 0
        self.allowance = s.hysteresis
        self.since = []  # whether each step since the scale last moved was an overflow
        self.fell_from = None  # the scale before the current run of overflows
        self.goal = None  # the scale that a recovery leads back to
        self.lowered = False  # whether any of that run counted, even where the floor held it
        self.settled = False  # below 1, where the next higher scale has just overflowed

    def step(self, finite):
        with np.errstate(over="ignore", under="ignore"):
            self.since.append(not finite)
            self._good() if finite else self._bad()

    def _bad(self):
        lower = max(self.scale * np.float32(self.s.backoff_factor), np.float32(self.s.min_scale))
        if self.fell_from is None:
            self.fell_from = self.scale
            if self.scale < 1 and lower >= self.scale:  # at the floor nothing is lost
                self.fell_from = self.scale / np.float32(2)
            elif lower < 1 and self.quiet == 0:  # it had just grown
                # On the way back from 1 or more it is tried once more.
                again = self.goal is not None and self.goal >= 1
                self.fell_from = lower / np.float32(2) if again else lower
        self.quiet, self.goal, self.settled = 0, None, False
        self.allowance = max(0, self.allowance - 1)
        share = np.float32(sum(self.since)) / np.float32(len(self.since))
        if self.allowance == 0 and share >= np.float32(self.s.tolerance):
            self.scale, self.lowered = lower, True
            self.since = []

    def _good(self):
        hurries = self.s.recovery_interval is not None
        if self.fell_from is not None:
            factor = np.float32(256) if self.scale >= 1 else np.float32(1)
            if self.scale < self.fell_from and self.scale * factor <= self.fell_from:
                self.goal = self.fell_from
            self.settled = self.lowered and self.scale < 1 and self.scale == self.fell_from
        self.fell_from, self.lowered = None, False
        patience = self.s.growth_interval
        if hurries and self.goal is not None:
            patience = min(patience, self.s.recovery_interval) if self.scale >= 1 else 1
        elif hurries and self.scale < 1 and not self.settled:
            patience = min(patience, self.s.recovery_interval)
        self.quiet += 1
        if self.s.consecutive_hysteresis:
            self.allowance = self.s.hysteresis
        if self.quiet >= patience:
            higher = min(self.scale * np.float32(self.s.growth_factor), self.s.max_scale)
            self.scale = min(higher, self.goal) if hurries and self.goal else higher
            self.scale = np.float32(self.scale)
            self.quiet, self.settled = 0, False
            self.allowance = self.s.hysteresis
            self.since = []
        if self.goal is not None and self.scale >= self.goal:
            self.goal = None

    def state(self):
        state = {"scale": float(self.scale), "step_counter": self.quiet}
        if self.s.hysteresis > 1:
            state["hysteresis_left"] = self.allowance
        if self.s.tolerance:
            state["steps_since_change"] = len(self.since)
            state["overflows_since_change"] = sum(self.since)
        if self.s.recovery_interval:
            settled = self.scale if self.settled else 0.0
            state["recover_to"] = float(self.goal or settled or -(self.fell_from or 0.0))
        return state


@st.composite
def schedules(draw):
    around_one = st.sampled_from([2.0**-9, 0.25, 0.5, 1.0, 2.0, 2.0**9])
    scale = st.floats(TINY, LARGEST, width=32) | around_one
    low, first, high = sorted(draw(st.tuples(scale, scale, scale)))
    return DynamicLossScale(
        initial_scale=first,
        min_scale=low,
        max_scale=high,
        growth_factor=draw(st.sampled_from([2, 1.5, 1.0001, 4.0, 2.0**60])),
        backoff_factor=draw(st.sampled_from([0.5, 0.75, 0.9999, 0.125, 2.0**-60])),
        growth_interval=draw(st.integers(1, 4)),
        hysteresis=draw(st.integers(1, 3)),
        consecutive_hysteresis=draw(st.booleans()),
        tolerance=draw(st.sampled_from([0.0, 0.05, 0.25, 0.5, 0.75])),
        recovery_interval=draw(st.none() | st.integers(1, 4)),
    )


def _numbers(state):
    return {key: ops.convert_to_numpy(value).item() for key, value in state.items()}


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(), steps=st.lists(st.booleans(), max_size=20))
@example(DynamicLossScale(), [False] * 20)
@example(DynamicLossScale(growth_interval=1), [True] * 12)
@example(DynamicLossScale(growth_interval=1, initial_scale=LARGEST, max_scale=LARGEST), [True])
@example(DynamicLossScale(recovery_interval=1), [True] + [False] * 9 + [True] * 12)
@example(DynamicLossScale(recovery_interval=1), [False] * 9 + [True] * 3 + [False] + [True] * 3)
@example(DynamicLossScale(2.0), [False] * 4 + [True] * 2 + [False] + [True] * 21 + [False, True])
@example(DynamicLossScale(2.0, growth_factor=4.0), [False] * 4 + [True] * 3)
@example(DynamicLossScale(tolerance=0.25), [True] * 4 + [False, True] * 6)
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
    config = json.loads(json.dumps(schedule.get_config()))
    assert DynamicLossScale.from_config(config) == schedule


def test_the_defaults_are_the_documented_ones():
    assert dataclasses.asdict(DynamicLossScale()) == {
        "initial_scale": 32768.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "hysteresis": 1,
        "min_scale": 2.0**-14,
        "max_scale": 16777216.0,
        "consecutive_hysteresis": False,
        "tolerance": 0.0,
        "recovery_interval": 20,
    }


def _scales(schedule, steps):
    state, scales = schedule.init(), []
    for finite in steps:
        state = schedule.update(state, finite)
        scales.append(_numbers(state)["scale"])
    return scales


def test_after_a_slump_the_scale_recovers_in_steps_and_not_in_epochs():
    """Fault 5: without a recovery, each doubling takes a whole growth interval."""
    steps = [False] * 10 + [True] * 200
    assert _scales(DynamicLossScale(recovery_interval=None), steps)[-1] == 2.0**5
    assert _scales(DynamicLossScale(), steps)[-1] == 2.0**15
    # Once back, it grows at the usual rate.
    assert _scales(DynamicLossScale(), [*steps, *[True] * 200])[-1] == 2.0**15


@pytest.mark.parametrize("fits", [2.0**16, 2.0**10, 1.0])
def test_the_first_search_costs_one_overflow_more_than_without_recovery(fits):
    """It looks like a slump, and the first growth after it overflows like the last one."""

    def overflows(interval):
        schedule = DynamicLossScale(2.0**24, recovery_interval=interval)
        state, seen = schedule.init(), []
        for _ in range(300):
            finite = _numbers(state)["scale"] <= fits
            seen.append(not finite)
            state = schedule.update(state, finite)
        return seen

    search, wanted = overflows(None), overflows(20)
    first = search.index(False)
    assert 2.0 ** (24 - first) == fits
    assert not any(search[first:])
    # Good steps until it grows, one overflow, and then the usual growth interval.
    assert [i for i, bad in enumerate(wanted) if bad] == [*range(first), first + 20]


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.sampled_from([[True], [True, True], [False], [False] * 7]), max_size=12))
def test_short_of_a_slump_and_down_to_one_the_default_is_the_rule_of_keras(steps):
    """Seven overflows in a row give a scale of 1/128."""
    sequence = [finite for part in steps for finite in (*part, True)]
    plain = DynamicLossScale(min_scale=1.0, growth_interval=3, recovery_interval=None)
    default = DynamicLossScale(min_scale=1.0, growth_interval=3, recovery_interval=1)
    assert _scales(default, sequence) == _scales(plain, sequence)


def test_hysteresis_counts_overflows_in_a_row_or_all_of_them():
    steps = [False, True] * 3
    assert _scales(DynamicLossScale(hysteresis=2), steps)[-1] == 2.0**13
    consecutive = DynamicLossScale(hysteresis=2, consecutive_hysteresis=True)
    assert _scales(consecutive, steps)[-1] == 2.0**15
    assert _scales(consecutive, [False, False])[-1] == 2.0**14


def test_a_share_of_overflows_below_the_tolerance_is_accepted():
    schedule = DynamicLossScale(tolerance=0.25)
    assert _scales(schedule, [True, True, True, True, False])[-1] == 2.0**15  # 1 of 5
    assert _scales(schedule, [True, True, True, False])[-1] == 2.0**14  # 1 of 4


@pytest.mark.parametrize("stored", [2.0**20, np.inf, -(2.0**20), -np.inf])
def test_a_recovery_that_was_loaded_with_a_target_above_the_ceiling_ends_there(stored):
    schedule = DynamicLossScale(2.0, max_scale=8.0, recovery_interval=1, growth_interval=100)
    state = {**schedule.init(), "recover_to": stored}
    for scale in (4.0, 8.0):
        state = schedule.update(state, True)
        assert _numbers(state)["scale"] == scale
    assert _numbers(state)["recover_to"] == 0.0


@pytest.mark.parametrize(("stored", "tolerated"), [(9, 2), (3, 2), (1, 0), (0, 0), (-5, 0)])
@pytest.mark.parametrize("good_first", [True, False])
def test_a_loaded_allowance_is_worth_no_more_than_the_hysteresis(stored, tolerated, good_first):
    schedule = DynamicLossScale(hysteresis=3)
    state = {**schedule.init(), "hysteresis_left": stored}
    if good_first:
        state = schedule.update(state, True)
    for _ in range(tolerated):
        state = schedule.update(state, False)
    assert _numbers(state)["scale"] == 2.0**15
    assert _numbers(schedule.update(state, False))["scale"] == 2.0**14


NO_NUMBER = ["2", "", None, True, False, np.bool_(True), [2.0], 2j]
REFUSED = [
    *(("initial_scale", v) for v in [0, 0.0, -1, np.inf, -np.inf, np.nan, 1e-46, 1e39, 10**400]),
    *(("growth_factor", v) for v in [1, 1.0, 0.5, 0, -2, np.inf, np.nan, 10**400]),
    *(("backoff_factor", v) for v in [1, 1.5, 0, -0.5, np.inf, np.nan, -(10**400)]),
    *(("tolerance", v) for v in [1, 1.0, -0.1, np.inf, np.nan]),
    *(("consecutive_hysteresis", v) for v in [0, 1, None, "yes"]),
    *(("recovery_interval", v) for v in [0, -1, 2.5, np.nan, "2", True]),
    *(("growth_interval", v) for v in [0, -1, 2.5, 2**31, np.inf, np.nan, 10**400]),
    *((n, v) for n in ("initial_scale", "growth_interval", "growth_factor") for v in NO_NUMBER),
    # These have the same validators as those above.
    *((n, v) for n in ("min_scale", "max_scale", "hysteresis", "backoff_factor") for v in (0, "2")),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda v: str(v)[:12])
def test_refuses_the_value_and_says_received_expected_and_fix(name, value):
    with pytest.raises(LossScaleError) as caught:
        DynamicLossScale(**{name: value})
    error = caught.value
    assert f"`{name}`" in str(error)
    assert error.received == repr(value)
    assert f"Received: {value!r}. Expected: {error.expected}." in str(error)
    assert error.expected
    assert error.fix
    assert str(error).endswith(error.fix)


@pytest.mark.parametrize(
    "settings_",
    [
        {"initial_scale": 2.0**-15},
        {"initial_scale": 2.0**25},
        {"min_scale": 2.0**16},
        {"max_scale": 2.0},
        {"min_scale": 8.0, "max_scale": 4.0, "initial_scale": 4.0},
    ],
)
def test_refuses_bounds_that_do_not_enclose_the_initial_scale(settings_):
    with pytest.raises(LossScaleError, match="min_scale <= initial_scale <= max_scale"):
        DynamicLossScale(**settings_)


@pytest.mark.parametrize("cls", [DynamicLossScale, LogMaxLossScale, UnderflowLossScale])
@pytest.mark.parametrize(("scale", "bound"), [(2.0**30, "max_scale"), (2.0**-15, "min_scale")])
def test_what_that_error_proposes_works(cls, scale, bound):
    with pytest.raises(LossScaleError) as caught:
        cls(initial_scale=scale)
    proposed = f"{cls.__name__}(initial_scale={scale}, {bound}={scale})"
    assert proposed in caught.value.fix
    assert cls(**{"initial_scale": scale, bound: scale}).initial_scale == scale


@pytest.mark.parametrize("value", [1024, np.float32(1024), np.int64(1024), Fraction(1024)])
def test_any_real_number_type_is_stored_as_a_python_number(value):
    schedule = DynamicLossScale(initial_scale=value, growth_interval=value)
    assert (schedule.initial_scale, type(schedule.initial_scale)) == (1024.0, float)
    assert (schedule.growth_interval, type(schedule.growth_interval)) == (1024, int)


def test_scales_are_stored_as_the_float32_numbers_that_the_variable_will_hold():
    schedule = DynamicLossScale(initial_scale=1.1, min_scale=1.1, max_scale=1.1)
    state = _numbers(schedule.update(schedule.init(), finite=False))
    assert schedule.check(state["scale"]) == schedule.initial_scale == float(np.float32(1.1))
