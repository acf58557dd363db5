"""Training with skipped steps, stopped halfway and continued, also in another process."""

import keras
import numpy as np
from keras import ops

import kerasmp as mp

X = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(96, 1)).astype("float32")
# Of twelve batches of eight the third and the fifth are skipped: their losses are finite, since
# tanh is, and their gradients are not.
X[[20, 36], 0] = np.inf
STOP, END = 6, 12

# When training stops, every part of its state has changed.
SCHEDULE = mp.DynamicLossScale(2.0**10, growth_factor=4.0, growth_interval=3, hysteresis=2)


def network():
    """Return a mixed float16 network, always with the same weights."""
    keras.utils.set_random_seed(0)
    return mp.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="tanh", dtype="mixed_float16"),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )


def compiled(**options):
    """Return the network with a built optimizer that averages, clips and decays."""
    model = network()
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.9)
    inner = keras.optimizers.AdamW(rate, use_ema=True, clipnorm=1.0)
    optimizer = mp.LossScaleOptimizer(inner, loss_scale=SCHEDULE)
    model.compile(optimizer, keras.losses.MeanSquaredError(), **options)
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, first, last):
    """Train on the batches from `first` to `last` and return the model."""
    for start in range(8 * first, 8 * last, 8):
        model.train_on_batch(X[start : start + 8], Y[start : start + 8])
    return model


def everything(model):
    """Return all state that training depends on, as arrays."""
    return [ops.convert_to_numpy(v.value) for v in [*model.variables, *model.optimizer.variables]]


def go_on(path):
    """Continue from a `.keras` file and return the final state as dtypes and lists."""
    end = everything(train(keras.models.load_model(path), STOP, END))
    return [(value.dtype.name, value.tolist()) for value in end]
