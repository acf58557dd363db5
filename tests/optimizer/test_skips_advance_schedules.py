"""Whether skipped steps advance learning-rate schedules; they never advance anything else."""

import keras
import numpy as np
import pytest
from helpers.stepping import EXACT_WAYS, each_of, numpy, tensors, variables_of
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.optimizer import LossScaleOptimizer

RATES = keras.optimizers.schedules.PiecewiseConstantDecay([1, 2, 3], [8.0, 4.0, 2.0, 1.0])
GOOD, BAD = 1.0, np.nan


def _optimizer(advance, inner=None):
    inner = inner or keras.optimizers.SGD(RATES)
    settings = {"skips_advance_schedules": advance, "fused": False}
    return LossScaleOptimizer(inner, loss_scale=1.0, **settings)


def _moves(optimizer, gradients, step):
    """Return the change of the weight in each step."""
    variables, moves = variables_of([0.0]), []
    for gradient in gradients:
        before = numpy(variables)[0]
        step(optimizer, tensors([gradient]), variables)
        moves.append((before - numpy(variables)[0]).item())
    return moves


@each_of(EXACT_WAYS)
@pytest.mark.parametrize(
    ("advance", "expected"), [(True, [8, 0, 0, 2, 1]), (False, [8, 0, 0, 8, 4])]
)
def test_a_skipped_step_moves_the_schedule_if_asked_to(advance, expected, step):
    optimizer = _optimizer(advance)
    assert _moves(optimizer, [GOOD, BAD, BAD, GOOD, GOOD], step) == expected
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 3


def test_the_learning_rate_that_can_be_read_is_the_one_in_use():
    optimizer = _optimizer(advance=True)
    _moves(optimizer, [GOOD, BAD, BAD], EXACT_WAYS[0])
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == 2.0


@pytest.mark.parametrize(("advance", "last"), [(True, 1.0), (False, 2.0)])
def test_where_gradients_are_accumulated_keras_counts_single_steps(advance, last):
    def inner():
        return keras.optimizers.SGD(RATES, gradient_accumulation_steps=2)

    step = EXACT_WAYS[0]
    assert _moves(inner(), [GOOD] * 4, step) == [0, 8, 0, 2]
    moves = _moves(_optimizer(advance, inner()), [GOOD, GOOD, BAD, GOOD, GOOD], step)
    assert moves == [0, 8, 0, 0, last]


def test_moments_count_applied_steps():
    gradients = [GOOD, 0.5 * GOOD, 0.25 * GOOD]
    with_skips = [gradients[0], BAD, BAD, *gradients[1:]]
    step = EXACT_WAYS[0]
    constant = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.5])
    skipping = _moves(_optimizer(True, keras.optimizers.Adam(constant)), with_skips, step)
    plain = _moves(keras.optimizers.Adam(constant), gradients, step)
    assert [move for move in skipping if move] == plain


def test_the_setting_survives_saving_and_two_optimizers_may_share_a_schedule():
    first, second = _optimizer(advance=True), _optimizer(advance=True)
    restored = LossScaleOptimizer.from_config(first.get_config())
    assert restored.skips_advance_schedules
    for optimizer in (first, restored):
        assert _moves(optimizer, [BAD, BAD, GOOD], EXACT_WAYS[0]) == [0, 0, 4]
    assert _moves(second, [GOOD], EXACT_WAYS[0]) == [8]


def test_a_schedule_that_is_set_later_advances_too():
    optimizer = LossScaleOptimizer("sgd", loss_scale=1.0, skips_advance_schedules=True)
    optimizer.learning_rate = RATES
    assert _moves(optimizer, [BAD, BAD, BAD, GOOD], EXACT_WAYS[0]) == [0, 0, 0, 2]


def test_anything_but_a_bool_is_refused():
    with pytest.raises(LossScaleError, match="skips_advance_schedules"):
        _optimizer(advance="yes")
