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


def trained(optimizer, scale, count):
    """Return a weight of 8 after steps against a gradient of 2, the first one with that scale."""
    variables = variables_of([8.0])
    optimizer.build(variables)
    optimizer.dynamic_scale.assign(scale)
    step = step_of(optimizer)
    for _ in range(count):
        now = float(ops.convert_to_numpy(optimizer.dynamic_scale.value))
        step(optimizer, tensors([np.float32(2.0) * np.float32(now)]), variables)
    return numpy(variables)[0].tolist()


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-45, 2.0**40, np.inf, np.nan])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_the_weights_are_right_and_move_again_at_the_second_step(schedule, scale):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=schedule)
    with np.errstate(invalid="ignore", over="ignore"):
        assert trained(optimizer, scale, 2) in ([6.0], [4.0])
    assert schedule.min_scale <= optimizer.loss_scale <= schedule.max_scale
    assert optimizer.applied_steps + optimizer.skipped_steps == 2


def test_stock_keras_divides_by_a_scale_of_zero():
    assert np.isnan(trained(Stock(keras.optimizers.SGD(1.0)), 0.0, 1)).all()


def test_a_scale_below_one_skips_what_only_unscaling_makes_overflow():
    variables = variables_of([1.0])
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(1.0), loss_scale=DynamicLossScale(2.0**-8, min_scale=2.0**-8)
    )
    eager(optimizer, tensors([3e38]), variables)
    assert numpy(variables)[0].tolist() == [1.0]
    assert optimizer.skipped_steps == 1
