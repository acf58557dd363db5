"""What is compared of the models in `helpers.zoo`: policies, dtypes, predictions, all else."""

from helpers import zoo
from helpers.flattened import flatten_layers, symbolic_dtypes
from keras import ops

import kerasmp as mp

COMPILED = ("train_function", "test_function", "predict_function")


def policies(model):
    """Return the class and the policy of each layer, InputLayers aside, holders first."""
    return [(each.class_name, each.policy) for each in mp.LayerPolicies.of(model)][1:]


def symbols(model):
    """Return the dtypes of all symbolic tensors in the graph of each model inside."""
    return [symbolic_dtypes(layer) for layer in flatten_layers(model)]


def weights(model):
    """Return the dtype and the bytes of each weight."""
    return [(v.dtype, ops.convert_to_numpy(v.value).tobytes()) for v in model.weights]


def optimizer(model):
    """Return the optimizer, and what is in it."""
    found = getattr(model, "optimizer", None)
    values = [] if found is None else [ops.convert_to_numpy(v.value) for v in found.variables]
    return found, [value.tobytes() for value in values]


def everything(model, recipe):
    """Return all that a way back must put back."""
    return {
        "class": type(model),
        "policies": [layer.dtype_policy for layer in flatten_layers(model)],
        # TensorFlow notes things of its own, at times of its own.
        "attributes": {name for name in vars(model) if not name.startswith("_self_")},
        "symbols": symbols(model),
        "weights": weights(model),
        "optimizer": optimizer(model),
        "outputs": zoo.outputs(model, recipe),
    }
