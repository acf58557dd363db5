"""Random sequences of steps through the real optimizer, against a float64 model of it."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.marks import marks_on
from helpers.stepping import (
    BACKEND,
    eager,
    graph,
    jitted,
    numpy,
    tensors,
    variables_of,
    xla,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from kerasmp.loss_scale import DynamicLossScale
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("oldest")

CAUSES = LossScaleOptimizer("sgd").skip_causes.keys()
RATE, MOMENTUM = 0.5, 0.75
START = [1.0, -2.0]
ORDINARY = st.floats(-4, 4, width=16)
# Finite, but not after multiplication by a scale above 2**8.
HUGE = st.sampled_from([2.0**120, -(2.0**120)])
BROKEN = st.sampled_from([np.inf, -np.inf, np.nan])
GRADIENT = st.tuples(ORDINARY, ORDINARY | ORDINARY | ORDINARY | HUGE | BROKEN)
# Whether the loss was finite, if the optimizer sees it.
LOSS = st.sampled_from([None, True, True, False])


@dataclasses.dataclass
class Model:
    """The rule as documented: SGD with momentum, scale and counters."""

    schedule: DynamicLossScale

    def __post_init__(self):
        self.weight, self.velocity = np.array(START), np.zeros(2)
        self.scale, self.good_steps = self.schedule.initial_scale, 0
        self.left, self.largest = self.schedule.hysteresis, 0.0
        self.applied = self.skipped = self.in_a_row = 0
        self.causes = dict.fromkeys(CAUSES, 0)

    def step(self, gradient, loss_finite=None):
        with np.errstate(over="ignore"):
            scaled = np.float32(np.array(gradient) * self.scale)
        if np.isfinite(scaled).all():
            self._move(np.float64(scaled) / self.scale)
            self.applied, self.in_a_row = self.applied + 1, 0
            self._grow()
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            cause = self._cause(loss_finite)
            self.causes[cause] += 1
            if cause != "loss":
                self._back_off()
        return scaled

    def _cause(self, loss_finite):
        if loss_finite is None:
            return "unknown"
        if not loss_finite:
            return "loss"
        return "gradients" if self.scale > self.schedule.min_scale else "floor"

    def _move(self, gradient):
        self.velocity = MOMENTUM * self.velocity - RATE * gradient
        self.weight = self.weight + self.velocity
        self.largest = max(self.largest, *np.abs(self.weight), *np.abs(self.velocity))

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


# JAX compiles eager and compiled steps again for each optimizer.
FEW = settings(max_examples=4, deadline=None)
MANY = settings(max_examples=25, deadline=None)
SEQUENCES = {
    "steps": st.lists(st.tuples(GRADIENT, LOSS), min_size=1, max_size=12),
    "interval": st.integers(1, 3),
    "hysteresis": st.integers(1, 3),
    "first": st.sampled_from([2.0, 2.0**7, 2.0**10]),
}


def schedule_of(interval, hysteresis, first):
    return DynamicLossScale(
        first,
        growth_interval=interval,
        hysteresis=hysteresis,
        min_scale=2.0,
        max_scale=2.0**10,
        recovery_interval=None,
    )


def compare(model, inner, step, steps):
    """Step the optimizer and the model and compare everything but the weights."""
    weights = variables_of(START)
    optimizer = LossScaleOptimizer(inner, loss_scale=model.schedule)
    for gradient, loss_finite in steps:
        if loss_finite is not None:
            optimizer.note_loss(ops.convert_to_tensor(1.0 if loss_finite else np.inf))
        step(optimizer, tensors(model.step(gradient, loss_finite)), weights)
        assert optimizer.loss_scale == model.scale
        assert optimizer.last_step_skipped == (model.in_a_row > 0)
    assert optimizer.applied_steps == int(numpy([optimizer.iterations])[0]) == model.applied
    assert optimizer.skipped_steps == model.skipped
    assert optimizer.skip_causes == model.causes
    assert optimizer.consecutive_skips == model.in_a_row
    assert int(numpy([optimizer.step_counter])[0]) == model.good_steps
    return numpy(weights)[0]


def check_momentum(step, steps, **settings_):
    model = Model(schedule_of(**settings_))
    weight = compare(model, keras.optimizers.SGD(RATE, MOMENTUM), step, steps)
    # Huge steps may cancel: float32 keeps the rounding error of the largest.
    np.testing.assert_allclose(weight, model.weight, rtol=1e-5, atol=1e-5 * max(model.largest, 1.0))


@FEW if BACKEND == "jax" else MANY
@given(**SEQUENCES)
def test_any_sequence_of_eager_steps_ends_where_the_model_does(steps, **settings_):
    check_momentum(eager, steps, **settings_)


# A compiled step does not see a loss that was noted outside of it.
COMPILED = [jitted] if BACKEND == "jax" else [graph, xla]


@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize("step", COMPILED[:1])
@FEW
@given(**SEQUENCES)
def test_a_few_sequences_of_compiled_steps_end_where_the_model_does(step, steps, **settings_):
    check_momentum(step, [(gradient, None) for gradient, _ in steps], **settings_)


@pytest.mark.full
@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize("step", COMPILED)
@MANY
@given(**SEQUENCES)
def test_many_sequences_of_compiled_steps_end_where_the_model_does(step, steps, **settings_):
    check_momentum(step, [(gradient, None) for gradient, _ in steps], **settings_)
