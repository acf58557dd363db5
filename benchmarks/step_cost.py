"""What loss scaling, the guarded train step and the monitor cost, as ratios to a plain step.

Every variant trains the same small MLP (launch-bound, so the worst case) through `fit`, for as many
steps; the variants take turns in random order in one process, and the figure is the median over the
rounds of wall time (behind the slash: CPU time) divided by the plain variant's of the same round.

    KERAS_BACKEND=tensorflow python benchmarks/step_cost.py --rounds 15
"""

import argparse
import os
import platform
import random
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import kerasmp as mp


def network(module):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((32,))]
    for _ in range(10):
        layers += [keras.layers.Dense(64, activation="relu"), keras.layers.BatchNormalization()]
    return module.Sequential([*layers, keras.layers.Dense(10)])


def compiled(module, optimizer):
    model = network(module)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile="auto")
    return model


def variants():
    """Return what is compared: a name, a model and the callbacks for `fit`."""
    adam = keras.optimizers.Adam
    return {
        "plain Adam": (compiled(keras, adam()), []),
        "stock LossScaleOptimizer": (
            compiled(keras, keras.optimizers.LossScaleOptimizer(adam())),
            [],
        ),
        "kerasmp LossScaleOptimizer": (compiled(keras, mp.LossScaleOptimizer(adam())), []),
        "the same + OverflowMonitor": (
            compiled(keras, mp.LossScaleOptimizer(adam())),
            [mp.OverflowMonitor()],
        ),
        "the same in kerasmp.Sequential": (compiled(mp, mp.LossScaleOptimizer(adam())), []),
    }


def measure(rounds, steps):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32 * steps, 32)).astype("float32")
    y = rng.integers(0, 10, size=(32 * steps,))
    compared = variants()
    times = {name: [] for name in compared}
    for round_number in range(rounds + 1):
        order = list(compared)
        random.Random(round_number).shuffle(order)  # noqa: S311 - an order, not a secret
        for name in order:
            model, callbacks = compared[name]
            wall, cpu = time.perf_counter(), time.process_time()
            model.fit(x, y, batch_size=32, shuffle=False, verbose=0, callbacks=list(callbacks))
            if round_number:  # the first one compiles
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    times = measure(arguments.rounds, arguments.steps)
    backend = keras.backend.backend()
    print(f"{backend}, Keras {keras.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    plain = times["plain Adam"]
    for name, taken in times.items():
        wall, cpu = (
            statistics.median(one[i] / base[i] for one, base in zip(taken, plain, strict=True))
            for i in (0, 1)
        )
        print(f"{name:34s} {wall:5.2f} / {cpu:5.2f}")


if __name__ == "__main__":
    main()
