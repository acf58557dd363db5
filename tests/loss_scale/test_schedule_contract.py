"""Contract of every loss-scale schedule; a new subclass of LossScale is included."""

import dataclasses
import importlib
import inspect
import json
import pickle
import pkgutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import kerasmp.loss_scale
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale, NoLossScale

pytestmark = pytest.mark.unit

for module in pkgutil.iter_modules(kerasmp.loss_scale.__path__, "kerasmp.loss_scale."):
    importlib.import_module(module.name)


def _subclasses(cls):
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


SCHEDULES = sorted(
    {c for c in _subclasses(LossScale) if c.__module__.startswith("kerasmp.")},
    key=lambda c: c.__name__,
)
every_schedule = pytest.mark.parametrize("cls", SCHEDULES, ids=lambda c: c.__name__)


def _numbers(state):
    return {key: ops.convert_to_numpy(value).item() for key, value in state.items()}


def test_the_registry_is_found():
    names = {cls.__name__ for cls in SCHEDULES}
    assert names >= {"DynamicLossScale", "FixedLossScale", "NoLossScale"}


@every_schedule
def test_is_a_frozen_value(cls):
    schedule = cls()
    assert dataclasses.is_dataclass(cls)
    assert schedule == cls()
    assert hash(schedule) == hash(cls())
    for name in ("initial_scale", "min_scale", "max_scale", "anything_else"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            setattr(schedule, name, 2.0)


@every_schedule
def test_starts_inside_its_own_bounds(cls):
    schedule = cls()
    assert 0 < schedule.min_scale <= schedule.initial_scale <= schedule.max_scale < np.inf
    assert schedule.init()["scale"] == schedule.initial_scale
    assert schedule.init()["step_counter"] == 0
    assert schedule.init() is not schedule.init()


@every_schedule
def test_state_is_python_numbers_whose_type_gives_the_dtype(cls):
    assert {type(value) for value in cls().init().values()} <= {int, float}


@every_schedule
@pytest.mark.parametrize("finite", [True, False])
def test_update_is_pure_and_keeps_the_keys(cls, finite):
    schedule = cls()
    state = schedule.init()
    before = dict(state)
    after = schedule.update(state, finite)
    assert state == before
    assert after.keys() == before.keys()
    assert _numbers(schedule.update(state, finite)) == _numbers(after)


@every_schedule
@pytest.mark.parametrize("finite", [True, False])
def test_update_takes_tensors_and_python_numbers_alike(cls, finite):
    schedule = cls()
    for value in (0.0, 0.25, np.inf):
        numbers = schedule.init(), dict.fromkeys(schedule.measures, value)
        state, measured = (
            {key: ops.convert_to_tensor(number) for key, number in given.items()}
            for given in numbers
        )
        by_tensor = schedule.update(state, ops.convert_to_tensor(finite), **measured)
        by_number = schedule.update(numbers[0], finite, **numbers[1])
        np.testing.assert_equal(_numbers(by_tensor), _numbers(by_number))


@every_schedule
def test_a_good_step_counts_and_a_bad_one_starts_again(cls):
    state = cls().update({**cls().init(), "step_counter": 5}, True)
    assert _numbers(state)["step_counter"] == 6
    assert _numbers(cls().update(state, False))["step_counter"] == 0


# Zero, ordinary, huge, and values that no applied step should give.
MEASURED = st.sampled_from([0.0, 2.0**-149, 0.3, 1.0, 1e4, 3e38, np.inf, np.nan, -1.0])
# Without subnormal numbers, which TensorFlow compares as zero.
LOADED = {float: st.floats(width=32, allow_subnormal=False), int: st.integers(-5, 2**31 - 10)}


@every_schedule
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_scale_is_inside_the_bounds_whatever_was_loaded_or_measured(cls, data):
    schedule = cls()
    state = {key: data.draw(LOADED[type(value)]) for key, value in schedule.init().items()}
    for finite in data.draw(st.lists(st.booleans(), min_size=1, max_size=8)):
        measured = {name: data.draw(MEASURED) for name in schedule.measures}
        state = schedule.update(state, finite, **measured)
        assert schedule.min_scale <= _numbers(state)["scale"] <= schedule.max_scale


@pytest.mark.parametrize("cls", [DynamicLossScale, FixedLossScale, NoLossScale])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_where_a_step_only_counts_the_whole_update_does_no_more(cls, data):
    schedule = cls()
    state = schedule.init()
    changed = data.draw(st.sampled_from(sorted(state)))
    usual = {float: st.sampled_from([0.0, 1.0, 2.0**15]), int: st.sampled_from([0, 1998, 1999])}
    state[changed] = data.draw(LOADED[type(state[changed])] | usual[type(state[changed])])
    state = {key: ops.convert_to_tensor(value) for key, value in state.items()}
    if bool(schedule.only_counts(state)):
        after = schedule.update(state, True)
        counted = {**state, "step_counter": state["step_counter"] + 1}
        assert _numbers(after) == _numbers(counted)


@pytest.mark.parametrize("cls", [DynamicLossScale, FixedLossScale, NoLossScale])
def test_nearly_every_step_only_counts(cls):
    state = {key: ops.convert_to_tensor(value) for key, value in cls().init().items()}
    assert bool(cls().only_counts(state))


def test_a_step_in_which_the_scale_grows_does_not_only_count():
    schedule = DynamicLossScale(growth_interval=5)
    state = {key: ops.convert_to_tensor(value) for key, value in schedule.init().items()}
    due = [bool(schedule.only_counts({**state, "step_counter": n})) for n in range(6)]
    assert due == [True] * 4 + [False] * 2


@every_schedule
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_no_statistic_breaks_the_state_for_good(cls, data):
    """After a few good steps with ordinary statistics the state holds ordinary numbers again."""
    short = {"window": 2} if "window" in inspect.signature(cls).parameters else {}
    schedule = cls(**short)
    state = schedule.init()
    for finite in data.draw(st.lists(st.booleans(), max_size=6)):
        measured = {name: data.draw(MEASURED) for name in schedule.measures}
        state = schedule.update(state, finite, **measured)
    for _ in range(3):
        state = schedule.update(state, True, **dict.fromkeys(schedule.measures, 0.5))
    assert np.isfinite(list(_numbers(state).values())).all()


@every_schedule
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 0.0, -1.0, 1e-30, 3e38])
def test_a_forced_bad_scale_comes_inside_on_the_next_good_step(cls, bad):
    schedule = cls()
    state = _numbers(schedule.update({**schedule.init(), "scale": bad}, True))
    assert schedule.min_scale <= state["scale"] <= schedule.max_scale


@every_schedule
@pytest.mark.parametrize(
    "trip",
    [
        lambda s: type(s).from_config(json.loads(json.dumps(s.get_config()))),
        lambda s: pickle.loads(pickle.dumps(s)),
        dataclasses.replace,
    ],
    ids=["config", "pickle", "replace"],
)
def test_survives_the_round_trip(cls, trip):
    assert trip(cls()) == cls()
    assert type(trip(cls())) is cls


@every_schedule
def test_config_is_the_constructors_arguments(cls):
    assert list(cls().get_config()) == list(inspect.signature(cls).parameters)
    assert repr(cls()).startswith(cls.__name__)


@every_schedule
@pytest.mark.parametrize("value", [0, -1.0, np.inf, np.nan, "8", True, None])
def test_check_refuses_invalid_scales(cls, value):
    with pytest.raises(ValueError, match=r"Received: .*Expected: "):
        cls().check(value)


@every_schedule
def test_check_names_the_bounds_that_it_enforces(cls):
    schedule = cls()
    assert schedule.check(schedule.max_scale) == schedule.max_scale
    assert schedule.check(schedule.min_scale) == schedule.min_scale
    with pytest.raises(ValueError, match=rf"{schedule.min_scale:g} to .*Choose a value inside"):
        schedule.check(schedule.min_scale / 2)
