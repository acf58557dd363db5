"""Scales below 1 last while gradients need them, and bad data does not hold the scale there."""

import numpy as np
import pytest
from keras import ops

from kerasmp.loss_scale import DynamicLossScale, LogMaxLossScale, UnderflowLossScale

pytestmark = pytest.mark.unit

FLOOR, NEED = 2.0**-14, 2.0**-7
each_schedule = pytest.mark.parametrize(
    "cls", [DynamicLossScale, LogMaxLossScale, UnderflowLossScale]
)


def run(schedule, steps, bad=(), need=np.inf):
    """Return the scale after each step, and how many overflowed.

    Args:
        schedule: The schedule.
        steps: Their number.
        bad: The steps whose gradients are NaN at any scale.
        need: The scale above which the others overflow. Below 2, many values are flushed to zero.
    """
    state, scales, overflows = schedule.init(), [], 0
    for step in range(steps):
        scale = float(ops.convert_to_numpy(state["scale"]))
        finite = step not in bad and scale <= need
        known = {
            "gradient_max": 65504 / min(need, 2.0**15),
            "underflow": 1.0 if scale < min(need, 2.0) else 0.0,
        }
        measured = {name: known[name] if finite else 0.0 for name in schedule.measures}
        state = schedule.update(state, finite, **measured)
        scales.append(float(ops.convert_to_numpy(state["scale"])))
        overflows += not finite
    return scales, overflows


@each_schedule
def test_after_many_bad_batches_the_scale_returns_above_one_at_once(cls):
    scales, _ = run(cls(), 120, bad=range(20, 60))
    assert scales[59] == FLOOR
    assert min(scales[74:]) >= 1.0
    assert scales[-1] >= 2.0**2


@each_schedule
@pytest.mark.parametrize("between", [range(65, 66), range(65, 105)], ids=len)
def test_bad_data_during_the_recovery_does_not_keep_the_scale_below_one(cls, between):
    scales, _ = run(cls(), 400, bad=[*range(20, 60), *between])
    assert scales[-1] >= 1.0


@each_schedule
def test_a_model_that_needs_a_scale_far_below_one_gets_it_with_few_skips(cls):
    scales, overflows = run(cls(), 400, need=NEED)
    assert overflows <= 22 + 2
    assert set(scales[-300:]) <= {NEED, NEED / 2}


@each_schedule
@pytest.mark.parametrize("every", [5, 25])
def test_occasional_bad_batches_do_not_lower_the_scale_for_good(cls, every):
    scales, _ = run(cls(2.0), 16 * every, bad=range(every - 1, 16 * every, every))
    assert min(scales) >= 0.5
    assert max(scales[-every:]) >= 1.0


@each_schedule
def test_occasional_bad_batches_do_not_lower_a_scale_below_one_for_good(cls):
    steps = 400
    bad = range(49, steps, 50)
    scales, overflows = run(cls(1.0), steps, bad, NEED)
    assert min(scales[50:]) >= NEED / 4
    assert np.median(scales) >= NEED / 2
    assert overflows <= 7 + 3 * len(bad)


@each_schedule
def test_random_bad_batches_do_not_lower_the_scale_for_good(cls):
    bad = set(np.flatnonzero(np.random.default_rng(0).random(600) < 0.05))
    scales, _ = run(cls(2.0), 600, bad)
    assert min(scales) >= 2.0**-5
    assert np.median(scales) >= 0.5


@pytest.mark.parametrize("cls", [DynamicLossScale, UnderflowLossScale])
def test_a_growth_that_differs_from_the_backoff_does_not_overshoot_repeatedly(cls):
    _, overflows = run(cls(1.0, growth_factor=4.0), 200, need=NEED)
    assert overflows <= 7 + 6


def test_an_older_configuration_keeps_its_floor():
    config = {**DynamicLossScale().get_config(), "min_scale": 1.0}
    scales, _ = run(DynamicLossScale.from_config(config), 40, bad=range(40))
    assert scales[-1] == 1.0


def flushed(schedule, steps, bad, largest):
    """Return the scale after each step where float16 flushes small gradients to zero.

    Args:
        schedule: The schedule.
        steps: Their number.
        bad: The steps whose gradients are NaN at any scale.
        largest: The largest gradient of a step.
    """
    state, scales, skipped = schedule.init(), [], 0
    for step in range(steps):
        scale, gradient = float(ops.convert_to_numpy(state["scale"])), largest(step)
        finite = step not in bad and gradient * scale < 65520
        seen = gradient if finite and gradient * scale >= 2.0**-24 else 0.0
        state = schedule.update(state, finite, gradient_max=seen)
        scales.append(float(ops.convert_to_numpy(state["scale"])))
        skipped += not finite
    return scales, skipped


@pytest.mark.parametrize("first", [0, 20], ids=["nothing-seen", "seen"])
@pytest.mark.parametrize("again", [(), range(66, 400, 5)], ids=["once", "now-and-then"])
def test_gradients_flushed_at_the_floor_do_not_leave_the_scale_of_maxima_there(first, again):
    scales, _ = flushed(LogMaxLossScale(), 200, [*range(first, 60), *again], lambda _: 2.0**-20)
    assert scales[59] == FLOOR
    assert min(scales[85:]) >= 1.0


def test_small_gradients_after_large_ones_do_not_leave_the_scale_of_maxima_low():
    scales, _ = flushed(
        LogMaxLossScale(1.0), 500, [], lambda step: 2.0**20 if step < 50 else 2.0**-22
    )
    assert scales[49] < 2.0**-3
    assert min(scales[100:]) >= 2.0**-2


def test_batches_of_zeros_do_not_drive_a_scale_below_one_into_overflows():
    _, skipped = flushed(
        LogMaxLossScale(NEED), 200, [], lambda step: 0.0 if step % 2 else 65504 / NEED
    )
    assert skipped <= 200 / 20


NOW_AND_THEN = [*range(20, 60), 61, 65, *range(100, 600, 100)]


@pytest.mark.parametrize("cls", [DynamicLossScale, UnderflowLossScale])
def test_occasional_bad_batches_do_not_hold_the_scale_at_the_floor(cls):
    scales, _ = run(cls(), 600, NOW_AND_THEN)
    assert scales[65] == FLOOR
    assert min(scales[500:]) >= 0.5


TOLERANT = {
    "apex": {"hysteresis": 2, "consecutive_hysteresis": True},
    "fairseq": {"tolerance": 0.1},
    "both": {"hysteresis": 2, "consecutive_hysteresis": True, "tolerance": 0.1},
}
each_tolerant = pytest.mark.parametrize("settings", TOLERANT.values(), ids=TOLERANT)


@each_tolerant
def test_tolerated_overflows_do_not_hold_the_scale_below_one(settings):
    schedule = DynamicLossScale(NEED, **settings)
    scales, _ = run(schedule, 500, bad=range(18, 500, 60))
    assert scales[-1] >= 1.0


@each_tolerant
@pytest.mark.parametrize("need", [0.5, NEED])
def test_a_scale_that_overflows_is_not_tried_again_and_again(settings, need):
    _, overflows = run(DynamicLossScale(need, **settings), 300, need=need)
    assert overflows <= 2


def test_two_bad_batches_where_one_is_tolerated_are_made_up_for():
    schedule = DynamicLossScale(NEED, **TOLERANT["apex"])
    scales, _ = run(schedule, 7, bad=[3, 4])
    assert scales[4:] == [NEED / 2, NEED, NEED]
