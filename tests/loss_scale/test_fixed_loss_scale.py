"""FixedLossScale and NoLossScale never move."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import FixedLossScale, NoLossScale

pytestmark = pytest.mark.unit

TINY, LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(TINY, LARGEST, width=32), steps=st.lists(st.booleans(), max_size=8))
def test_a_fixed_scale_never_moves_and_counts_good_steps_in_a_row(scale, steps):
    schedule = FixedLossScale(scale)
    state, in_a_row = schedule.init(), 0
    for finite in steps:
        state = schedule.update(state, finite)
        in_a_row = in_a_row + 1 if finite else 0
        assert ops.convert_to_numpy(state["scale"]) == np.float32(scale)
        assert ops.convert_to_numpy(state["step_counter"]) == in_a_row


@pytest.mark.parametrize(
    "value", [0, -1, np.inf, np.nan, 1e39, 1e-46, 10**400, "2", True, None, [1.0]], ids=str
)
def test_a_fixed_scale_refuses_the_value_and_says_received_expected_and_fix(value):
    with pytest.raises(LossScaleError) as caught:
        FixedLossScale(value)
    assert f"Received: {value!r}. Expected: a number from" in str(caught.value)
    assert str(caught.value).endswith("The default is 32768.0.")


@pytest.mark.parametrize(("scale", "floor"), [(1024.0, 1.0), (1.0, 1.0), (0.25, 0.25)])
def test_a_fixed_scale_may_be_set_down_to_one_or_to_its_own_value(scale, floor):
    schedule = FixedLossScale(scale)
    assert schedule.min_scale == floor
    assert schedule.check(scale) == scale


def test_no_loss_scale_allows_only_one():
    schedule = NoLossScale()
    assert schedule.check(1) == 1.0
    with pytest.raises(LossScaleError, match="outside the bounds"):
        schedule.check(2.0)
