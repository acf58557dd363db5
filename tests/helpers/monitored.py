"""Small training runs with bad batches for OverflowMonitor."""

import keras
import numpy as np

from kerasmp.optimizer import LossScaleOptimizer

STOCK = keras.optimizers.LossScaleOptimizer


def batches(pattern):
    """Return one row for each letter: "g" is good, "b" is not finite, "h" is huge.

    With the loss "mae" a huge row has a finite loss, whose gradient overflows from a scale of 2 on.
    """
    x = np.random.default_rng(0).normal(size=(len(pattern), 3)).astype("float32")
    x[[letter == "b" for letter in pattern]] = np.inf
    x[[letter == "h" for letter in pattern]] = [3e38, 0, 0]
    return x, np.ones((len(pattern), 1), "float32")


def make(optimizer=None, model=keras.Sequential, dtype="float32", loss="mse", **compile_arguments):
    keras.utils.set_random_seed(2)
    model = model([keras.Input((3,)), keras.layers.Dense(1, dtype=dtype, name="only")])
    if optimizer is None:
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=8)
    model.compile(optimizer, loss, **compile_arguments)
    return model


def fit(model, pattern, callbacks=(), **arguments):
    arguments = {"batch_size": 1, "shuffle": False, "verbose": 0} | arguments
    return model.fit(*batches(pattern), callbacks=list(callbacks), **arguments).history
