"""Models whose variables are narrowed in place."""

import keras
import numpy as np

import kerasmp as mp

layers = keras.layers
RNG = np.random.default_rng(3)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype("float32")
WORDS = RNG.integers(0, 20, size=(4, 6)).astype("int32")


def vision():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.LayerNormalization(),
            layers.Dense(4),
        ]
    )


def text(**kwargs):
    words = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8)(words)
    return keras.Model(words, layers.Dense(3)(layers.LSTM(8, **kwargs)(x)))


MODELS = {"vision": (vision, IMAGES), "text": (text, WORDS)}


def lived_in(build):
    """Return a model whose numbers float16 has to round, statistics too."""
    model = build()
    rng = np.random.default_rng(5)
    model.set_weights([w + rng.uniform(0.01, 0.3, w.shape) for w in model.get_weights()])
    return model


def narrowed(model, dtype="float16"):
    """Narrow all layers; return the report, which keeps what they had."""
    return mp.convert(model, dtype, rules=None, variables=dtype)
