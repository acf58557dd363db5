"""What lint says of a batch of data."""

import keras
import numpy as np
import pytest
from helpers.linted import Own, X, dense, found, made, only

import kerasmp as mp

layers = keras.layers

# NumPy and JAX say so of the constants that are looked for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


# input-range


LARGE = np.full((8, 8), 7e4, "float32")


@pytest.mark.unit
def test_values_that_float16_cannot_hold_are_an_error():
    each = only(made(dense()), "input-range", LARGE)
    assert each.severity == "error"
    assert "70000" in each.reason
    assert "70000" in only(made(dense()), "input-range", -LARGE).reason
    assert not found(made(dense()), "input-range", LARGE / 2)
    assert not found(made(dense()), "input-range")


def test_whole_numbers_count_and_ids_do_not():
    x = np.full((8, 8), 70000)
    model = made(dense())
    assert not np.isfinite(keras.ops.convert_to_numpy(model(x))).all()
    assert only(model, "input-range", x).severity == "error"
    ids = made(lambda: layers.Embedding(80000, 4), layers.Flatten, dtype="int32")
    assert not found(ids, "input-range", x)


def test_a_float32_layer_that_hands_on_gives_no_peace():
    model = made(lambda: layers.Flatten(dtype="float32"), dense())
    assert not np.isfinite(keras.ops.convert_to_numpy(model(LARGE))).all()
    assert only(model, "input-range", LARGE).severity == "error"


@pytest.mark.unit
def test_a_float32_layer_in_front_gives_peace():
    scaling = lambda: layers.Rescaling(1e-5, dtype="float32")  # noqa: E731 - as the others
    assert not found(made(scaling, dense()), "input-range", LARGE)
    assert found(made(lambda: layers.Rescaling(1e-5), dense()), "input-range", LARGE)


@pytest.mark.unit
def test_steps_that_are_masked_before_they_are_rounded_do_not_count():
    x = np.ones((8, 4, 8), "float32")
    x[:, 2:] = -99999.0
    # The graph hands LSTM the mask, which has no values.
    model = made(lambda: mp.layers.Masking(-99999.0), lambda: layers.LSTM(8), shape=(4, 8))
    assert not found(model, "input-range", x)
    x[0, 0, 0] = -99999.0  # in a step that is not masked
    assert found(model, "input-range", x)


@pytest.mark.unit
def test_only_the_input_that_is_too_large_is_named():
    small, large = keras.Input((8,), name="small"), keras.Input((8,), name="large")
    outputs = layers.Add(dtype="mixed_float16")([small, 2 * large])
    model = keras.Model({"small": small, "large": large}, layers.Dense(8)(outputs))
    each = only(model, "input-range", {"small": X, "large": LARGE})
    assert each.place == "input large"


@pytest.mark.unit
def test_inputs_are_followed_into_models():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, made(dense())(inputs))
    assert found(model, "input-range", LARGE)
    model = keras.Model(inputs, made(dense(), policy="float32")(inputs))
    assert not found(model, "input-range", LARGE)


def test_models_without_a_graph_cast_what_they_are_given():
    with mp.policy_scope("mixed_float16"):
        own = Own()
    with np.errstate(over="ignore"):
        assert found(own, "input-range", LARGE)
        assert not found(Own(), "input-range", LARGE)
