"""A bad micro-batch where the inner optimizer accumulates gradients.

It is not counted: the next good one replaces it, so that each update averages exactly the intended
number of good micro-batches. Later windows end later, as `iterations`, `skipped_steps` and
`accumulated_steps` show.
"""

import keras
import numpy as np
from helpers.marks import full_on, marks_on
from helpers.stepping import EXACT_WAYS, assert_same_bits, each_of, numpy
from helpers.twins import Twins
from keras import ops

import kerasmp as mp
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("oldest")

WINDOW = 3
every_way = each_of(EXACT_WAYS)


def accumulating(_):
    return keras.optimizers.Adam(0.1, gradient_accumulation_steps=WINDOW)


@every_way
@full_on("jax")
def test_the_scale_may_move_within_a_window(step):
    """Accumulated gradients are unscaled; in PyTorch the scale must be constant in a window."""
    twins = Twins(accumulating, step)
    schedule = mp.DynamicLossScale(initial_scale=2.0**12, growth_interval=1)
    twins.wrapped = LossScaleOptimizer(accumulating(None), loss_scale=schedule)
    for seed in range(WINDOW):
        twins.scale = 2.0 ** (12 + seed)
        twins.good(seed)
    assert twins.wrapped.loss_scale == 2.0**15
    twins.check()


@every_way
def test_a_bad_micro_batch_is_not_counted_and_the_shift_of_the_windows_can_be_seen(step):
    twins = Twins(accumulating, step)
    assert twins.wrapped.accumulated_steps == 0
    seen = []
    for seed, good in enumerate([True, True, True, True, False, True, True, True]):
        twins.good(seed) if good else twins.bad()
        seen.append((twins.wrapped.accumulated_steps, twins.iterations(twins.wrapped)))
    # Without the bad one the sixth micro-batch would have ended the second window.
    assert seen == [(1, 0), (2, 0), (0, 1), (1, 1), (1, 1), (2, 1), (0, 2), (1, 2)]
    twins.check()
    assert (twins.wrapped.applied_steps, twins.wrapped.skipped_steps) == (7, 1)


def test_without_accumulation_no_micro_batch_is_counted():
    twins = Twins(lambda _: keras.optimizers.SGD(0.1), EXACT_WAYS[0])
    twins.good(0)
    assert twins.wrapped.accumulated_steps is None


def test_an_open_window_survives_loading():
    step = EXACT_WAYS[0]
    twins = Twins(accumulating, step)
    for seed in range(WINDOW + 2):
        twins.good(seed)
    again = LossScaleOptimizer(accumulating(None), loss_scale=2.0**12)
    again.build(twins.ours)
    again.set_weights(numpy(twins.wrapped.variables))
    assert again.accumulated_steps == 2


X = np.random.default_rng(0).normal(size=(7 * 8, 4)).astype("float32")
Y = X[:, :1] * 2 - 1


def _fitted(x, y, optimizer, monitors=()):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    history = model.fit(
        x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=list(monitors)
    )
    return numpy(model.variables), history.history


@full_on("jax")
def test_fit_with_a_bad_micro_batch_ends_where_fit_without_it_ends_and_the_logs_tell():
    expected, _ = _fitted(X, Y, accumulating(None))
    bad = np.full((8, 4), np.nan, "float32")
    x, y = np.concatenate([X[:16], bad, X[16:]]), np.concatenate([Y[:16], Y[:8], Y[16:]])
    optimizer = LossScaleOptimizer(accumulating(None), loss_scale=2.0**12)
    weights, logs = _fitted(x, y, optimizer, [mp.OverflowMonitor()])
    assert_same_bits(weights, expected)
    assert logs["skipped_steps"] == [1, 1]
    # Seven good micro-batches an epoch: after the first epoch one waits, after the second two.
    assert logs["accumulated_steps"] == [1, 2]
    assert int(ops.convert_to_tensor(optimizer.iterations)) == 4
