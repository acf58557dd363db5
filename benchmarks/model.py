"""Defines the cost of `kerasmp.Model` and OverflowMonitor compared with `keras.Model`.

All variants use kerasmp's LossScaleOptimizer, so they differ only in the protection against skipped
steps, or in the monitor. The networks are those of `overhead.py`: an MLP with 20 Dense and 20
BatchNormalization layers, which is limited by the number of kernels and has 40 statistics to
protect, and a transformer with 20 million parameters. The monitor reads every 50 of the 200 steps
in a round, and when `fit` begins and ends. "counts" compares the step with one that does not count
for each variable how often its gradient was inf or NaN.
"""

from unittest import mock

import interleaved
from overhead import fitting

import kerasmp as mp

SCALED = mp.LossScaleOptimizer
NAMES = ("mlp", "transformer", "monitor", "counts")


def without_counts(fit):
    """Return a function that runs `fit` with a step that was traced without the counts."""

    def run():
        with mock.patch("kerasmp.optimizer.step.count_nonfinite", lambda numbers, *_: numbers):
            return fit()

    return run


def variants(name, jit):
    """Return the functions to compare, by name, and no counts."""
    if name == "monitor":
        return {
            "unwatched": fitting("long mlp", jit, SCALED),
            interleaved.AGAIN: fitting("long mlp", jit, SCALED),
            "monitor": fitting("long mlp", jit, SCALED, callbacks=[mp.OverflowMonitor()]),
        }, {}
    if name == "counts":
        return {
            "uncounted": without_counts(fitting("long mlp", jit, SCALED)),
            interleaved.AGAIN: without_counts(fitting("long mlp", jit, SCALED)),
            "counted": fitting("long mlp", jit, SCALED),
        }, {}
    return {
        "keras.Model": fitting(name, jit, SCALED),
        interleaved.AGAIN: fitting(name, jit, SCALED),
        "kerasmp.Model": fitting(name, jit, SCALED, mp.Model.from_keras),
    }, {}
