"""LogMaxLossScale against moments in float64, on draws whose distribution is known."""

import numpy as np
import pytest
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import LogMaxLossScale

pytestmark = pytest.mark.unit


def _run(schedule, maxima):
    state = schedule.init()
    for largest in maxima:
        state = schedule.update(state, largest is not None, largest or 0.0)
    return {key: ops.convert_to_numpy(value).item() for key, value in state.items()}


def test_the_scale_is_that_of_the_moments_in_float64():
    exponents = np.random.default_rng(0).normal(-4.0, 1.5, size=60)
    state = _run(LogMaxLossScale(mean_decay=0.9, variance_decay=0.95), 2.0**exponents)

    def average(values, decay):
        return np.average(values, weights=decay ** np.arange(len(values))[::-1])

    variance = average(exponents**2, 0.95) - average(exponents, 0.95) ** 2
    allowed = 16 - (average(exponents, 0.9) + 3.09 * np.sqrt(variance))
    assert state["scale"] == 2.0 ** np.floor(allowed)


def test_an_overflow_at_least_halves_the_scale_and_moves_the_mean():
    before = _run(LogMaxLossScale(), [2.0] * 50)
    after = _run(LogMaxLossScale(), [2.0] * 50 + [None])
    # Rounding in float32 may leave a spread just above zero.
    assert before["scale"] in {2.0**14, 2.0**15}
    assert after["scale"] <= before["scale"] / 2
    assert after["step_counter"] == 0


def test_a_good_step_at_most_doubles_the_scale():
    assert _run(LogMaxLossScale(8.0), [2.0**-8])["scale"] == 16.0


def test_a_step_of_zeros_changes_nothing_but_the_counter():
    before = _run(LogMaxLossScale(), [2.0, 8.0])
    after = _run(LogMaxLossScale(), [2.0, 8.0, 0.0])
    assert after == {**before, "step_counter": 3}


def test_overflows_from_the_start_lower_the_scale_to_the_floor_until_gradients_raise_it():
    assert _run(LogMaxLossScale(), [None] * 40)["scale"] == 2.0**-14
    assert _run(LogMaxLossScale(), [None] * 3 + [2.0**-8] * 20)["scale"] >= 2.0**20


@pytest.mark.parametrize(
    ("name", "value"),
    [("deviations", 0), ("mean_decay", 1.0), ("variance_decay", 0), ("initial_scale", 2.0**-15)],
)
def test_refuses_invalid_settings(name, value):
    with pytest.raises(LossScaleError, match=r"Received: .*Expected: "):
        LogMaxLossScale(**{name: value})


@pytest.mark.parametrize("key", ["mean", "mean_weight", "slow_mean", "square", "slow_weight"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loaded_moment_that_is_not_finite_does_not_hold_the_scale_down(key, bad):
    schedule = LogMaxLossScale()
    state = schedule.update({**schedule.init(), key: bad}, True, gradient_max=4.0)
    assert float(ops.convert_to_numpy(state["scale"])) == 2.0**14
