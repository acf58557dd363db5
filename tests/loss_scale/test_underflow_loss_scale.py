"""UnderflowLossScale, on given shares of underflow."""

import numpy as np
import pytest
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import UnderflowLossScale

pytestmark = pytest.mark.unit


def _scales(schedule, shares):
    """Return the scale after each step; None is an overflow."""
    state, scales = schedule.init(), []
    for share in shares:
        state = schedule.update(state, share is not None, share or 0.0)
        scales.append(ops.convert_to_numpy(state["scale"]).item())
    return scales


def test_it_grows_by_the_mean_over_a_window_and_no_single_step():
    schedule = UnderflowLossScale(8.0, max_underflow=0.1, window=4)
    assert _scales(schedule, [0.38, 0, 0, 0]) == [8, 8, 8, 8]
    assert _scales(schedule, [0.42, 0, 0, 0]) == [8, 8, 8, 16]
    # The next window begins empty.
    assert _scales(schedule, [0.38, 0, 0, 0, 0.38, 0, 0, 0])[-1] == 8


def test_it_grows_while_the_share_falls_and_no_longer():
    schedule = UnderflowLossScale(8.0, window=1)
    assert _scales(schedule, [0.5, 0.4, 0.3, 0.29, 0.29, 0.29]) == [16, 32, 64, 64, 64, 64]
    assert _scales(schedule, [0.5, 0.4, 0.0009, 0.0]) == [16, 32, 32, 32]


def test_growth_is_tried_again_after_the_share_has_changed():
    schedule = UnderflowLossScale(8.0, window=1)
    assert _scales(schedule, [0.3, 0.29, 0.29, 0.5]) == [16, 16, 16, 32]


def test_with_all_gradients_zero_the_search_continues():
    assert _scales(UnderflowLossScale(1.0, window=1, max_scale=64.0), [1.0] * 8)[-1] == 64.0


def test_growth_waits_after_an_overflow():
    schedule = UnderflowLossScale(8.0, window=1, growth_interval=3)
    assert _scales(schedule, [0.5, None, 0.5, 0.5, 0.5]) == [16, 8, 8, 8, 16]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_sum_that_is_not_finite_is_dropped_with_its_window(broken):
    schedule = UnderflowLossScale(8.0, window=2)
    state = {**schedule.init(), "underflow_sum": broken, "underflow_before": broken}
    scales = []
    for _ in range(4):
        state = schedule.update(state, True, 0.5)
        scales.append(ops.convert_to_numpy(state["scale"]).item())
    assert scales == [8, 8, 8, 16]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_underflow", 1.0),
        ("max_underflow", -0.1),
        ("window", 0),
        ("growth_interval", 2.5),
        ("growth_factor", 1.0),
        ("backoff_factor", 1.0),
        ("initial_scale", 0.0),
        ("min_scale", 2.0**16),
    ],
)
def test_invalid_settings_are_refused(name, value):
    with pytest.raises(LossScaleError, match=name):
        UnderflowLossScale(**{name: value})
