"""A scale that came from outside past every check: the weights outlive it, and so does training.

Checkpoints of frameworks assign to variables without asking anyone; stock Keras's can hold 0
(fault 3).
"""

import keras
import numpy as np
import pytest
from helpers.stepping import Stock, eager, numpy, step_of, tensors, variables_of
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
def test_the_weights_are_right_and_move_again_at_the_second_step(schedule):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=schedule)
    (weight,) = variables = variables_of([8.0])
    optimizer.build(variables)
    for scale in (0.0, -1.0, 2.0**-45, 2.0**40, np.inf, np.nan):
        weight.assign([8.0])
        optimizer.loss_scale = schedule.initial_scale  # and whatever else it has starts anew
        optimizer.dynamic_scale.assign(scale)
        for _ in range(2):
            step_against_two(optimizer, variables)
        assert numpy(variables)[0].tolist() in ([6.0], [4.0])
        assert schedule.min_scale <= scale_of(optimizer) <= schedule.max_scale
    assert optimizer.applied_steps + optimizer.skipped_steps == 12


@every_schedule
def test_it_is_inside_after_a_single_step(schedule):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.0), loss_scale=schedule)
    variables = variables_of([1.0])
    optimizer.build(variables)
    for scale in (np.nan, np.inf, 0.0, 1e-30):  # with the second one the step is applied
        optimizer.dynamic_scale.assign(scale)
        eager(optimizer, tensors([1.0]), variables)
        assert schedule.min_scale <= scale_of(optimizer) <= schedule.max_scale


@pytest.mark.full
def test_stock_keras_divides_by_a_scale_of_zero():
    variables = variables_of([8.0])
    optimizer = Stock(keras.optimizers.SGD(1.0))
    optimizer.build(variables)
    optimizer.dynamic_scale.assign(0.0)
    step_against_two(optimizer, variables)
    assert np.isnan(numpy(variables)[0]).all()
