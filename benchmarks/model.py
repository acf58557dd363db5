"""What `kerasmp.Model` and the monitor cost a training step on top of `keras.Model`.

All with our LossScaleOptimizer, so that nothing differs but what undoes a skipped step, or what
watches it. Networks as in `overhead.py`: an MLP of 20 Dense and 20 BatchNormalization layers, which
is bound by the number of kernels and has 40 statistics to guard, and a transformer of 20 million
parameters. The monitor looks every 50 of the 200 steps of a round, and when `fit` begins and ends.
"""

import interleaved
from overhead import fitting

import kerasmp as mp

SCALED = mp.LossScaleOptimizer
NAMES = ("mlp", "transformer", "monitor")


def variants(name, jit):
    """Return what is compared, by name, and nothing that was counted."""
    if name == "monitor":
        return {
            "unwatched": fitting("long mlp", jit, SCALED),
            interleaved.AGAIN: fitting("long mlp", jit, SCALED),
            "monitor": fitting("long mlp", jit, SCALED, callbacks=[mp.OverflowMonitor()]),
        }, {}
    return {
        "keras.Model": fitting(name, jit, SCALED),
        interleaved.AGAIN: fitting(name, jit, SCALED),
        "kerasmp.Model": fitting(name, jit, SCALED, mp.Model.from_keras),
    }, {}
