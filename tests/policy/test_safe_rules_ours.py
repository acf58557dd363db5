"""The rule set "safe" and layers of ours: who swaps keras.layers for kerasmp.layers loses nothing.

The classes are looked up, so that a new layer is held to it.
"""

import keras
import pytest
from helpers.layer_cases import CASES, OURS

import kerasmp as mp
from kerasmp.policy.assign import assign
from kerasmp.policy.safe import ACTIVATED

POLICY = mp.Policy("mixed_float16", rules="safe")
# Our class and Keras's.
PAIRS = {n: (c, getattr(keras.layers, n)) for n, c in OURS.items() if hasattr(keras.layers, n)}


def answer(cls, *, then=(), **arguments):
    """Return what a layer, with others after it, is to follow, and the rule that says so."""
    case = CASES[cls.__name__]
    layer = cls(**{**case.arguments(), **arguments})
    inputs = [keras.Input(shape[1:]) for shape in case.shapes]
    outputs = case.call(layer, *inputs)
    for each in then:
        outputs = each(outputs)
    row = next(row for row in assign(keras.Model(inputs, outputs), POLICY) if row.layer is layer)
    return row.after, row.reason


@pytest.mark.parametrize("name", PAIRS)
def test_a_head_is_float32_whoever_makes_it(name):
    ours, stock = (answer(cls) for cls in PAIRS[name])
    assert ours[0] == stock[0] == "float32"
    assert '"safe"' in ours[1]


# What a layer is given, and whether that makes it one for float32.
GIVEN = {
    "softmax": ({"activation": "softmax"}, True),
    "sigmoid": ({"activation": "sigmoid"}, True),
    "gelu": ({"activation": "gelu"}, False),
    "nothing": ({}, False),
    "penalty": ({"activity_regularizer": "l2"}, True),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", [n for n, (_, stock) in PAIRS.items() if stock in ACTIVATED])
def test_what_a_layer_applies_counts_whoever_makes_it(name, given):
    arguments, float32 = GIVEN[given]
    relu = [keras.layers.ReLU(), keras.layers.ReLU()]
    ours, stock = (answer(cls, **arguments, then=relu) for cls in PAIRS[name])
    assert ours == stock
    assert (ours[0] == "float32") == float32


@pytest.mark.parametrize("wrapper", [mp.layers.SpectralNormalization, keras.layers.TimeDistributed])
@pytest.mark.parametrize("room", [mp.layers, keras.layers])
def test_what_a_wrapper_holds_is_seen(wrapper, room):
    inside = room.Dense(3, activation="softmax")
    inputs = keras.Input((5, 6))
    outputs = keras.layers.ReLU()(keras.layers.ReLU()(wrapper(inside)(inputs)))
    rows = assign(keras.Model(inputs, outputs), POLICY)
    after = {type(row.layer): row.after for row in rows}
    assert after[room.Dense] == "float32"
    assert after[wrapper] == "mixed_float16"
