"""Random sequences of steps through the real optimizer, against a model of it in float64."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.stepping import EXACT_WAYS, eager, numpy, tensors, variables_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kerasmp.loss_scale import DynamicLossScale
from kerasmp.optimizer import LossScaleOptimizer

RATE, MOMENTUM = 0.5, 0.75
START = [1.0, -2.0]
ORDINARY = st.floats(-4, 4, width=16)
# Finite, but not once it is multiplied by a scale above 2**8.
HUGE = st.sampled_from([2.0**120, -(2.0**120)])
BROKEN = st.sampled_from([np.inf, -np.inf, np.nan])
GRADIENT = st.tuples(ORDINARY, ORDINARY | ORDINARY | ORDINARY | HUGE | BROKEN)


@dataclasses.dataclass
class Model:
    """The rule as the documentation tells it: SGD with momentum, scale, counters."""

    schedule: DynamicLossScale

    def __post_init__(self):
        self.weight, self.velocity = np.array(START), np.zeros(2)
        self.scale, self.good_steps = self.schedule.initial_scale, 0
        self.left, self.largest = self.schedule.hysteresis, 0.0
        self.applied = self.skipped = self.in_a_row = 0

    def step(self, gradient):
        with np.errstate(over="ignore"):
            scaled = np.float32(np.array(gradient) * self.scale)
        if np.isfinite(scaled).all():
            self.velocity = MOMENTUM * self.velocity - RATE * np.float64(scaled) / self.scale
            self.weight = self.weight + self.velocity
            self.largest = max(self.largest, *np.abs(self.weight), *np.abs(self.velocity))
            self.applied, self.in_a_row = self.applied + 1, 0
            self._grow()
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self._back_off()
        return scaled

    def _grow(self):
        self.good_steps += 1
        if self.good_steps >= self.schedule.growth_interval:
            self.good_steps, self.left = 0, self.schedule.hysteresis
            self.scale = min(self.scale * self.schedule.growth_factor, self.schedule.max_scale)

    def _back_off(self):
        self.good_steps = 0
        self.left = max(self.left - 1, 0)
        if self.left == 0:
            self.scale = max(self.scale * self.schedule.backoff_factor, self.schedule.min_scale)


@pytest.mark.parametrize("step", [EXACT_WAYS[-1], eager], ids=["compiled", "eager"])
@settings(max_examples=25, deadline=None)
@given(
    gradients=st.lists(GRADIENT, min_size=1, max_size=12),
    interval=st.integers(1, 3),
    hysteresis=st.integers(1, 3),
    first=st.sampled_from([2.0, 2.0**7, 2.0**10]),
)
def test_any_sequence_of_steps_ends_where_the_model_does(
    step, gradients, interval, hysteresis, first
):
    schedule = DynamicLossScale(
        first, growth_interval=interval, hysteresis=hysteresis, min_scale=2.0, max_scale=2.0**10
    )
    model, weights = Model(schedule), variables_of(START)
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(RATE, MOMENTUM), loss_scale=schedule)
    for gradient in gradients:
        step(optimizer, tensors(model.step(gradient)), weights)
        assert optimizer.loss_scale == model.scale
        assert optimizer.last_step_skipped == (model.in_a_row > 0)
    assert optimizer.applied_steps == int(numpy([optimizer.iterations])[0]) == model.applied
    assert optimizer.skipped_steps == optimizer.skip_causes["unknown"] == model.skipped
    assert optimizer.consecutive_skips == model.in_a_row
    assert int(numpy([optimizer.step_counter])[0]) == model.good_steps
    # Huge steps may cancel each other: float32 remembers the largest of them to its last bits.
    atol = 1e-5 * max(model.largest, 1.0)
    np.testing.assert_allclose(numpy(weights)[0], model.weight, rtol=1e-5, atol=atol)
