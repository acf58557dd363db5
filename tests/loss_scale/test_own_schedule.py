"""A schedule that a user writes: saved and resumed like ours, or a clear error."""

import dataclasses

import keras
import pytest
from helpers.stepping import WAYS, tensors, variables_of
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale, NoLossScale
from kerasmp.optimizer import LossScaleOptimizer


class Bare(LossScale):
    """No dataclass: runs, and cannot be saved."""

    initial_scale = min_scale = max_scale = 8.0

    def update(self, state, finite):  # noqa: ARG002 - LossScale's
        return state


class Telling(Bare):
    """No dataclass either, but it says what it is made of."""

    def get_config(self):
        return {}


def test_one_that_is_no_dataclass_says_so_when_it_is_saved():
    optimizer = LossScaleOptimizer("sgd", loss_scale=Bare())
    assert optimizer.loss_scale == 8.0
    with pytest.raises(LossScaleError, match=r"Bare, which is no dataclass.*get_config"):
        optimizer.get_config()


def test_a_get_config_of_its_own_will_do():
    config = LossScaleOptimizer("sgd", loss_scale=Telling()).get_config()
    objects = {"Telling": Telling}
    again = LossScaleOptimizer.from_config(config, custom_objects=objects)
    assert type(again.schedule) is Telling


@pytest.mark.parametrize("step", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("parent", [DynamicLossScale, FixedLossScale, NoLossScale])
def test_a_rule_that_replaces_one_of_ours_is_followed_in_every_step(parent, step):
    @dataclasses.dataclass(frozen=True)
    class Counting(parent):
        def update(self, state, finite):
            after = super().update(state, finite)
            return {**after, "step_counter": after["step_counter"] + 1}

    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=Counting())
    variables = variables_of([1.0])
    for _ in range(3):
        step(optimizer, tensors([0.0]), variables)
    assert int(ops.convert_to_numpy(optimizer.step_counter)) == 6
