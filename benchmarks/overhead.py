"""Defines the cost of loss scaling in a training step: plain optimizer, stock wrapper, kerasmp.

All layers compute in float32, so only the scaling differs. The networks are an MLP with 82
variables and a CNN with 150 (both limited by the number of kernels, the worst case), and a
transformer with 20 million parameters.
"""

import keras
import numpy as np
from update import OPTIMIZERS


def mlp():
    layers = [keras.Input((32,))]
    for _ in range(20):
        layers += [keras.layers.Dense(64, activation="relu"), keras.layers.BatchNormalization()]
    return keras.Sequential([*layers, keras.layers.Dense(10)])


def cnn():
    layers = [keras.Input((8, 8, 8))]
    for _ in range(37):
        convolution = keras.layers.Conv2D(8, 3, padding="same", activation="relu")
        layers += [convolution, keras.layers.BatchNormalization()]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def transformer(width=512, depth=6, words=2000):
    inputs = keras.Input((32,), dtype="int32")
    x = keras.layers.Embedding(words, width)(inputs)
    for _ in range(depth):
        normal = keras.layers.LayerNormalization()(x)
        x += keras.layers.MultiHeadAttention(8, width // 8)(normal, normal)
        normal = keras.layers.LayerNormalization()(x)
        hidden = keras.layers.Dense(4 * width, activation="gelu")(normal)
        x += keras.layers.Dense(width)(hidden)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def adam():
    return keras.optimizers.Adam(1e-4)


def momentum():
    return keras.optimizers.SGD(1e-3, momentum=0.9)


# Network, shape of an input, number of words (None: floats), batch, steps in a round, optimizer.
NETWORKS = {
    "mlp": (mlp, (32,), None, 32, 20, adam),
    "long mlp": (mlp, (32,), None, 32, 200, adam),
    "cnn": (cnn, (8, 8, 8), None, 8, 10, momentum),
    "transformer": (transformer, (32,), 2000, 4, 3, adam),
}
NAMES = ("mlp", "cnn", "transformer")


def fitting(name, jit, optimizer, convert=lambda model: model, callbacks=()):
    """Return a function that trains a network for a round of steps.

    Args:
        name: The name of the network.
        jit: Whether XLA compiles it.
        optimizer: Takes the network's optimizer and returns the one to train with.
        convert: Takes the model and returns the one to train.
        callbacks: Callbacks for `fit`.
    """
    build, shape, words, batch, steps, inner = NETWORKS[name]
    rng = np.random.default_rng(0)
    size = (batch * steps, *shape)
    x = rng.integers(0, words, size) if words else rng.normal(size=size).astype("float32")
    y = rng.integers(0, 10, size=len(x))
    keras.utils.set_random_seed(0)
    model = convert(build())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer(inner()), loss, jit_compile=jit)
    return lambda: model.fit(
        x, y, batch_size=batch, shuffle=False, verbose=0, callbacks=list(callbacks)
    )


def variants(name, jit):
    """Return the functions to compare, by name, and no counts."""
    return {label: fitting(name, jit, wrap) for label, wrap in OPTIMIZERS.items()}, {}
