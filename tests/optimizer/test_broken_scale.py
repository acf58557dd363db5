"""A scale that no check has seen returns to its bounds without harm to weights or training.

A framework's checkpoint assigns to the variable directly, and one of stock Keras may hold 0: fault
3.
"""

import keras
import numpy as np
import pytest
from helpers.stepping import numpy, step_of, tensors, variables_of
from keras import ops

from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, NoLossScale
from kerasmp.optimizer import LossScaleOptimizer

SCHEDULES = [DynamicLossScale(), FixedLossScale(), NoLossScale()]
every_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__
)


def scale_of(optimizer):
    return float(ops.convert_to_numpy(optimizer.dynamic_scale.value))


def step_against_two(optimizer, variables):
    """Take one step against a gradient of 2."""
    with np.errstate(invalid="ignore", over="ignore"):
        gradient = np.float32(2.0) * np.float32(scale_of(optimizer))
    step_of(optimizer)(optimizer, tensors([gradient]), variables)


@every_schedule
def test_the_scale_returns_at_once_and_the_weights_move_by_the_second_step(schedule):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=schedule)
    (weight,) = variables = variables_of([8.0])
    optimizer.build(variables)
    for scale in (0.0, -1.0, 2.0**-45, 2.0**40, np.inf, np.nan):
        weight.assign([8.0])
        optimizer.loss_scale = schedule.initial_scale  # and its other state starts anew
        optimizer.dynamic_scale.assign(scale)
        for _ in range(2):
            step_against_two(optimizer, variables)
            assert schedule.min_scale <= scale_of(optimizer) <= schedule.max_scale
        assert numpy(variables)[0].tolist() in ([6.0], [4.0])
    assert optimizer.applied_steps + optimizer.skipped_steps == 12
