"""The layers of a model and their state, before and after kerasmp layers replace them."""

import keras
import numpy as np
from helpers.flattened import flatten_layers

import kerasmp as mp
from kerasmp.backend.keras_graph import policy_of
from kerasmp.backend.keras_internals import autocasts, own_variables

layers = keras.layers
# The kerasmp class for each stock class with a counterpart.
COUNTERPARTS = {
    getattr(layers, name): getattr(mp.layers, name)
    for name in mp.layers.__all__
    if hasattr(layers, name)
}


def numpy(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def flags(layer):
    """Return name, dtype, trainability and autocast of the variables of a layer itself."""
    return [(v.name, v.dtype, v.trainable, autocasts(v)) for v in own_variables(layer)]


def replace_layers(model, policy="float32", **how):
    """Replace the layers of a model; return the report and the names of replaced classes."""
    report = mp.convert(model, policy, safe_layers=True, **how)
    return report, sorted(row.replaced for row in report.rows if row.replaced)


def state(model):
    """Return everything that a replacement could change, for `assert_state`."""
    return [
        (
            layer,
            type(layer),
            {name: value for name, value in vars(layer).items() if name not in STEPS_KEPT},
            [(v, v.dtype, v.trainable, autocasts(v)) for v in own_variables(layer)],
            policy_of(layer).name,
        )
        for layer in flatten_layers(model)
    ]


# Compiled steps are dropped by conversion and restore; the others are made by the first call.
STEPS_KEPT = {
    *("train_function", "test_function", "predict_function", "_jit_compile"),
    *("_called", "_dropout_mask", "_recurrent_dropout_mask"),
}


def assert_state(model, before):
    for now, then in zip(state(model), before, strict=True):
        assert now[0] is then[0]
        assert now[1] is then[1]
        assert now[2].keys() == then[2].keys()
        for name, value in then[2].items():
            assert _is_same(now[2][name], value), (now[0], name)
        assert [(id(v), *rest) for v, *rest in now[3]] == [(id(v), *rest) for v, *rest in then[3]]
        assert now[4] == then[4]


def _is_same(one, other):
    if one is other:
        return True
    if keras.ops.is_tensor(one):  # of Normalization, which makes it again when it is restored
        return one.dtype == other.dtype and np.array_equal(numpy(one), numpy(other))
    return type(one) is type(other) and isinstance(one, (tuple, list, dict)) and one == other


def stock_left(model):
    """Return the stock layers that have a counterpart, except for parts of attention."""
    parts = [
        part
        for layer in flatten_layers(model)
        if isinstance(layer, (layers.MultiHeadAttention, layers.GroupQueryAttention))
        for part in flatten_layers(layer)[1:]
    ]
    return [x for x in flatten_layers(model) if type(x) in COUNTERPARTS and x not in parts]
