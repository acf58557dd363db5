"""A short float16 training with one bad batch, and its outcome.

A row of 3000 gives a finite loss and gradients beyond float16; a row of inf a loss of inf or NaN.
"""

import functools

import keras
import numpy as np
from helpers import train_steps

import kerasmp as mp

CLASSES = {
    "ours": mp.LossScaleOptimizer,
    # The update that several replicas use.
    "ours, not fused": functools.partial(mp.LossScaleOptimizer, fused=False),
    "stock": keras.optimizers.LossScaleOptimizer,
}
OVERFLOW, DATA = 3000.0, float("inf")
ROWS = 8
SCALE = 2.0**10
GOOD = np.random.default_rng(0).normal(size=(4, ROWS, 4)).astype("float32")


def batches(bad_row=None, value=3000.0):
    """Return the good batches; with `bad_row`, also a bad one in third position."""
    if bad_row is None:
        return [*GOOD]
    bad = GOOD[0].copy()
    bad[bad_row] = value
    return [*GOOD[:2], bad, *GOOD[2:]]


def targets(x):
    """Return the targets for the rows of `x`."""
    return np.ones((len(x), 1), "float32")


def network(module=keras, between=()):
    """Return a new `Sequential` of kerasmp or keras, always with the same weights."""
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(8, dtype="mixed_float16")
    return module.Sequential([keras.Input((4,)), hidden, *between, keras.layers.Dense(1)])


def guarded_network(own_step):
    """Return a kerasmp network with BatchNormalization, perhaps with a user-defined train step."""
    between = [keras.layers.BatchNormalization(dtype="mixed_float16")]
    return network(train_steps.MODULE if own_step else mp, between)


def flat(values):
    """Return the numbers of all arrays as one list."""
    return np.concatenate([np.asarray(value).ravel() for value in values]).tolist()


def outcome(model, optimizer):
    """Return the weights and, for a kerasmp optimizer, its state and counters."""
    weights = {"weights": flat(model.get_weights())}
    if not isinstance(optimizer, mp.LossScaleOptimizer):
        return weights
    return weights | {
        "state": flat(optimizer.get_weights()),
        "scale": optimizer.loss_scale,
        "skipped": optimizer.skipped_steps,
        "applied": optimizer.applied_steps,
    }


def assert_skipped_everywhere(runs, replicas, scale=SCALE / 2, where=None):
    """Check the results of `helpers.mirrored`: a bad batch changed nothing anywhere (fault 1)."""
    assert len(runs["bad"]) == (replicas if where is None else len(where))
    assert np.isfinite(runs["clean"]["weights"]).all()
    assert (runs["clean"]["skipped"], runs["clean"]["applied"]) == (0, 4)
    for run in runs["bad"]:
        assert run["weights"] == runs["clean"]["weights"]
        assert (run["skipped"], run["applied"], run["scale"]) == (1, 4, scale)
        assert len(run["copies"]) == replicas
        assert all(copy == run["copies"][0] for copy in run["copies"])
