"""Sparse gradients on TensorFlow are applied as by the plain optimizer, bit for bit."""

import keras
import numpy as np
import pytest
from helpers.marks import few
from helpers.stepping import EXACT_WAYS, assert_same_bits, built, each_of, numpy, variables_of

from kerasmp.optimizer import LossScaleOptimizer

pytestmark = pytest.mark.backend("tensorflow")

SCALE, ROWS = 2.0**12, 6
# Rows that occur twice, three times and never.
INDICES = [[4, 0, 4], [1, 1, 1], [5, 4, 0]]
OPTIMIZERS = {
    "SGD": lambda **more: keras.optimizers.SGD(0.5, **more),
    "momentum": lambda **more: keras.optimizers.SGD(0.5, momentum=0.9, **more),
    "Adam": lambda **more: keras.optimizers.Adam(0.1, **more),
    "AdamW": lambda **more: keras.optimizers.AdamW(0.1, **more),
    "Adagrad": lambda **more: keras.optimizers.Adagrad(0.1, **more),
    "RMSprop": lambda **more: keras.optimizers.RMSprop(0.1, **more),
}
COMPANY = [
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"clipvalue": 0.25},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5},
    {"use_ema": True, "ema_overwrite_frequency": 2},
]


def gradients(seed, scale=1.0, bad=None):
    """Return a sparse and a dense gradient; the sparse one has the value `bad` if given."""
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3, 2)).astype("float32") * scale
    if bad is not None:
        rows[-1, -1] = bad
    dense = rng.standard_normal(2).astype("float32") * scale
    indices = tf.constant(INDICES[seed % len(INDICES)])
    return [
        tf.IndexedSlices(tf.constant(rows), indices, tf.constant([ROWS, 2])),
        tf.constant(dense),
    ]


def start():
    return variables_of(np.ones((ROWS, 2)), [0.5, -0.5])


CASES = [*((name, {}) for name in OPTIMIZERS), *(("Adam", company) for company in COMPANY)]
QUICK = [("momentum", {}), ("Adam", COMPANY[4]), ("Adam", COMPANY[5])]


@each_of(EXACT_WAYS)
@pytest.mark.parametrize(("name", "company"), few(CASES, QUICK), ids=[f"{n} {c}" for n, c in CASES])
def test_equals_the_plain_optimizer_and_skips_bad_steps(name, company, step):
    make = OPTIMIZERS[name]
    ours, theirs = start(), start()
    # The dense variable would be fused, which rounds differently: see test_fused.py.
    wrapped = LossScaleOptimizer(make(**company), loss_scale=SCALE, fused=False)
    plain = make(**company)
    built(wrapped, ours)
    for seed in range(5):
        before = numpy([*ours, *wrapped.inner_optimizer.variables])
        step(wrapped, gradients(seed, SCALE, bad=np.nan if seed % 2 else np.inf), ours)
        assert_same_bits(numpy([*ours, *wrapped.inner_optimizer.variables]), before)
        step(wrapped, gradients(seed, SCALE), ours)
        step(plain, gradients(seed), theirs)
    assert (wrapped.applied_steps, wrapped.skipped_steps) == (5, 5)
    assert wrapped.nonfinite_counts.tolist() == [5, 0]
    mine = numpy([*ours, *wrapped.inner_optimizer.variables])
    assert_same_bits(mine, numpy([*theirs, *plain.variables]))
    assert np.any(mine[0] != 1.0)


def test_duplicate_rows_whose_scaled_sum_overflows_are_no_overflow():
    """Unscaled, the rows and their sum are far from the limit: no step is skipped."""
    import tensorflow as tf

    rows = tf.constant([[3e38], [3e38]])
    variables = variables_of([[0.0], [0.0]])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=SCALE)
    optimizer.apply([tf.IndexedSlices(rows, tf.constant([1, 1]), tf.constant([2, 1]))], variables)
    assert optimizer.applied_steps == 1
    np.testing.assert_allclose(numpy(variables)[0].ravel(), [0.0, -6e38 / SCALE], rtol=1e-6)
