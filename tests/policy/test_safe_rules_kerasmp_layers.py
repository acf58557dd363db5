"""The rules "safe" treat kerasmp.layers as they treat keras.layers.

The classes are looked up, so that a new layer is held to it.
"""

import inspect

import keras
import pytest
from helpers.layer_cases import CASES, OURS
from helpers.marks import few

import kerasmp as mp

# The kerasmp class and Keras's.
PAIRS = {n: (c, getattr(keras.layers, n)) for n, c in OURS.items() if hasattr(keras.layers, n)}


def answer(cls, *, then=(), **arguments):
    """Return the policy of a layer followed by others, and the rule that decides."""
    case = CASES[cls.__name__]
    layer = cls(**{**case.arguments(), **arguments})
    inputs = [keras.Input(shape[1:]) for shape in case.shapes]
    outputs = case.call(layer, *inputs)
    for each in then:
        outputs = each(outputs)
    row = next(row for row in rows(keras.Model(inputs, outputs)) if row.layer is layer)
    return row.after, row.reason


def rows(model):
    return mp.convert(model, "mixed_float16", rules="safe", dry_run=True).rows


HEADS = ("Dense", "LSTM", "Softmax", "SpectralNormalization", "AveragePooling1D")


@pytest.mark.parametrize("name", few(PAIRS, HEADS))
def test_a_head_is_float32_whichever_package_its_layer_is_from(name):
    ours, stock = (answer(cls) for cls in PAIRS[name])
    assert ours[0] == stock[0] == "float32"
    assert '"safe"' in ours[1]


# Arguments of a layer, and whether they require float32.
GIVEN = {
    "softmax": ({"activation": "softmax"}, True),
    "sigmoid": ({"activation": "sigmoid"}, True),
    "gelu": ({"activation": "gelu"}, False),
    "nothing": ({}, False),
    "penalty": ({"activity_regularizer": "l2"}, True),
}


def applies(stock):
    """Return whether a class applies an activation to its outputs."""
    recurrent = issubclass(stock, keras.layers.RNN)
    named = "activation" in inspect.signature(stock).parameters
    return named and not recurrent and stock is not keras.layers.Activation


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", few([n for n, (_, s) in PAIRS.items() if applies(s)], ["Dense"]))
def test_the_activation_of_a_layer_counts_whichever_package_the_layer_is_from(name, given):
    arguments, float32 = GIVEN[given]
    relu = [keras.layers.ReLU(), keras.layers.ReLU()]
    ours, stock = (answer(cls, **arguments, then=relu) for cls in PAIRS[name])
    assert ours == stock
    assert (ours[0] == "float32") == float32


@pytest.mark.parametrize("wrapper", [mp.layers.SpectralNormalization, keras.layers.TimeDistributed])
@pytest.mark.parametrize("package", [mp.layers, keras.layers])
def test_layers_inside_a_wrapper_are_found(wrapper, package):
    inside = package.Dense(3, activation="softmax")
    inputs = keras.Input((5, 6))
    outputs = keras.layers.ReLU()(keras.layers.ReLU()(wrapper(inside)(inputs)))
    after = {type(row.layer): row.after for row in rows(keras.Model(inputs, outputs))}
    assert after[package.Dense] == "float32"
    assert after[wrapper] == "mixed_float16"
