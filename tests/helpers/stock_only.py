"""Load a model in a process that has not imported kerasmp."""

import sys

import keras
import numpy as np

X = np.random.default_rng(0).normal(size=(4, 6, 4)).astype("float32")  # as in helpers.converted


def load(path, policy):
    """Return the compute dtypes of all layers, and the outputs."""
    keras.config.set_dtype_policy(policy)
    model = keras.models.load_model(path)
    assert "kerasmp" not in sys.modules
    outputs = keras.ops.convert_to_numpy(model(X)).astype("float64")
    return dtypes_of(model), outputs.tolist()


def dtypes_of(model):
    """Return the compute dtypes of all layers but containers, whose own Keras does not save."""
    containers = (keras.Model, keras.layers.InputLayer)
    flat = model._flatten_layers(include_self=False)
    return [layer.compute_dtype for layer in flat if not isinstance(layer, containers)]
