"""What the optimizer keeps of a schedule, in every way of stepping, is what the schedule says."""

import keras
import numpy as np
import pytest
from helpers.stepping import WAYS, tensors, variables_of
from keras import ops

from kerasmp.loss_scale import (
    DynamicLossScale,
    FixedLossScale,
    LogMaxLossScale,
    NoLossScale,
    UnderflowLossScale,
)
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.optimizer.measures import MEASURES

# Every setting that adds to the state or to the rule is in use in one of them.
SCHEDULES = [
    DynamicLossScale(2.0**10, growth_interval=2),
    DynamicLossScale(2.0**10, growth_interval=3, recovery_interval=1),
    DynamicLossScale(2.0**10, growth_interval=2, recovery_interval=None),
    DynamicLossScale(
        2.0**10, growth_interval=3, hysteresis=2, consecutive_hysteresis=True, tolerance=0.3
    ),
    FixedLossScale(8.0),
    NoLossScale(),
    LogMaxLossScale(2.0**10),
    UnderflowLossScale(2.0**10, window=2, growth_interval=2),
]
# Long enough a run of overflows for a slump, and what comes before and after one.
STEPS = [1.0, 0.25, np.inf, 3.0, *[np.nan] * 10, 2.0, 1.0, 0.0, 4.0, np.inf, 1.0]


def _numbers(state):
    return {key: ops.convert_to_numpy(value) for key, value in state.items()}


@pytest.mark.parametrize("step", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_state_in_the_optimizer_is_that_of_the_schedule(schedule, step):
    variables = variables_of([1.0, 2.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.0), loss_scale=schedule)
    optimizer.build(variables)
    state = schedule.init()
    for value in STEPS:
        (gradient,) = tensors([value * optimizer.loss_scale, 2.0**-24])
        finite = bool(np.isfinite(value))
        measured = {
            name: MEASURES[name]([gradient], optimizer.loss_scale) if finite else 0.0
            for name in schedule.measures
        }
        state = schedule.update(state, finite, **measured)
        step(optimizer, [gradient], variables)
        held = _numbers({key: v.value for key, v in optimizer._schedule_variables().items()})
        for key, wanted in _numbers(state).items():
            # XLA may round sums otherwise; scales and counters are exact all the same.
            exact = key in {"scale", "recover_to"} or wanted.dtype.kind in "iu"
            np.testing.assert_allclose(held[key], wanted, rtol=0 if exact else 1e-5, err_msg=key)
