"""What `kerasmp.Model` costs a training step on top of `keras.Model`.

Both with our LossScaleOptimizer, so that nothing differs but what undoes a skipped step. Networks
as in `overhead.py`: an MLP of 20 Dense and 20 BatchNormalization layers, which is bound by the
number of kernels and has 40 statistics to guard, and a transformer of 20 million parameters.

    KERAS_BACKEND=tensorflow python benchmarks/model.py --jit no
    KERAS_BACKEND=tensorflow python benchmarks/model.py --jit yes
    KERAS_BACKEND=jax python benchmarks/model.py
"""

import argparse

import interleaved
import keras
import numpy as np
import overhead

import kerasmp as mp


def variants(name, jit):
    """Return what is compared: a name, and a function that trains for a round."""
    build, shape, words, batch, steps, inner = overhead.NETWORKS[name]
    rng = np.random.default_rng(0)
    size = (batch * steps, *shape)
    x = rng.integers(0, words, size) if words else rng.normal(size=size).astype("float32")
    y = rng.integers(0, 10, size=len(x))

    def fitting(turn):
        keras.utils.set_random_seed(0)
        model = turn(build())
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(mp.LossScaleOptimizer(inner()), loss, metrics=["accuracy"], jit_compile=jit)
        return lambda: model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)

    return {
        "keras.Model": fitting(lambda model: model),
        "kerasmp.Model": fitting(mp.Model.from_keras),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="of mlp, cnn, transformer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--jit", choices=["no", "yes"], default="no")
    arguments = parser.parse_args()
    jit = arguments.jit == "yes" or keras.backend.backend() == "jax"
    for name in arguments.networks or ["mlp", "transformer"]:
        times = interleaved.measure(variants(name, jit), arguments.rounds)
        interleaved.report(f"{name}{', jit' if jit else ''}", times)


if __name__ == "__main__":
    main()
