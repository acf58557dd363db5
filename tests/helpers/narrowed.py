"""Models whose variables were narrowed in place, and one that is loaded where nothing was."""

import contextlib

import keras
import numpy as np

import kerasmp as mp
from kerasmp.backend.keras_graph import policy_of, refresh_symbolic_dtypes, set_policy
from kerasmp.backend.keras_private import flatten_layers
from kerasmp.conversion.variables import Wanted, narrow_variables

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


def narrowed(model, dtype="float16", undo=None):
    """Narrow all layers; the policies follow, and the graph says so."""
    parts = [x for x in flatten_layers(model) if not isinstance(x, layers.InputLayer)]
    rows = [Wanted(layer, layer.path or layer.name, dtype) for layer in parts]
    undo = contextlib.ExitStack() if undo is None else undo
    facts = narrow_variables(rows, undo)
    for layer in parts:
        undo.callback(set_policy, layer, policy_of(layer))
        set_policy(layer, keras.dtype_policies.get(dtype))
    refresh_symbolic_dtypes(model)
    model.predict_function = None
    return facts


def load(path, batch):
    """Return what a model of a file predicts, and the dtypes of its variables."""
    assert mp.__version__
    assert keras.config.dtype_policy().name == "float32"
    model = keras.models.load_model(path)
    predicted = model.predict(MODELS[batch][1], verbose=0)
    dtypes = sorted({v.dtype for v in model.variables if "seed" not in v.path})
    return {"predicted": np.asarray(predicted, "float32").tolist(), "dtypes": dtypes}
