"""User-defined loss-scale schedules: what they must be, and the errors otherwise."""

import dataclasses

import pytest

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale, NoLossScale

pytestmark = pytest.mark.unit


class Bare(LossScale):
    """Not a dataclass: it runs but cannot be saved."""

    initial_scale = min_scale = max_scale = 8.0

    def update(self, state, finite):  # noqa: ARG002 - LossScale's
        return state


def test_a_schedule_that_is_not_a_dataclass_is_refused_when_it_is_saved():
    assert Bare().init() == {"scale": 8.0, "step_counter": 0}
    with pytest.raises(LossScaleError, match=r"Bare, which is not a dataclass.*get_config"):
        Bare().get_config()


@pytest.mark.parametrize("parent", [DynamicLossScale, FixedLossScale, NoLossScale])
def test_an_overridden_update_is_called_in_every_step(parent):
    """The answer of the inherited rule may not hold for an overridden one."""

    @dataclasses.dataclass(frozen=True)
    class Counting(parent):
        def update(self, state, finite):
            return super().update(state, finite)

    @dataclasses.dataclass(frozen=True)
    class Renamed(parent):
        pass

    assert Counting().only_counts(Counting().init()) is None
    assert Renamed().only_counts(Renamed().init()) is not None
