"""Findings of lint about a batch of data."""

import keras
import numpy as np
import pytest
from helpers.linted import Own, X, dense, found, made, only

import kerasmp as mp

layers = keras.layers

# NumPy and JAX warn about the constants that lint looks for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


# input-range


LARGE = np.full((8, 8), 7e4, "float32")


def test_values_that_float16_cannot_hold_are_an_error():
    each = only(made(dense()), "input-range", LARGE)
    assert each.severity == "error"
    assert "70000" in each.reason
    assert "70000" in only(made(dense()), "input-range", -LARGE).reason
    assert not found(made(dense()), "input-range", LARGE / 2)
    assert not found(made(dense()), "input-range")


def test_integers_are_checked_and_ids_are_not():
    x = np.full((8, 8), 70000)
    model = made(dense())
    assert not np.isfinite(keras.ops.convert_to_numpy(model(x))).all()
    assert only(model, "input-range", x).severity == "error"
    ids = made(lambda: layers.Embedding(80000, 4), layers.Flatten, dtype="int32")
    assert not found(ids, "input-range", x)


def test_a_float32_layer_that_passes_values_on_still_gives_a_finding():
    model = made(lambda: layers.Flatten(dtype="float32"), dense())
    assert not np.isfinite(keras.ops.convert_to_numpy(model(LARGE))).all()
    assert only(model, "input-range", LARGE).severity == "error"


def test_a_float32_layer_in_front_gives_no_finding():
    scaling = lambda: layers.Rescaling(1e-5, dtype="float32")  # noqa: E731 - as the others
    assert not found(made(scaling, dense()), "input-range", LARGE)
    assert found(made(lambda: layers.Rescaling(1e-5), dense()), "input-range", LARGE)


@pytest.mark.keras("3.15")  # an older one passes no masks on NumPy
def test_steps_that_are_masked_before_they_are_rounded_do_not_count():
    x = np.ones((8, 4, 8), "float32")
    x[:, 2:] = -99999.0
    model = made(lambda: mp.layers.Masking(-99999.0), dense(), shape=(4, 8))
    assert not found(model, "input-range", x)
    x[0, 0, 0] = -99999.0  # in a step that is not masked
    assert found(model, "input-range", x)


@pytest.mark.keras("3.15")  # see above
@pytest.mark.parametrize("value", [-99999.0, np.full((1,), -99999.0, "float32")])
def test_masked_values_that_come_in_another_shape_do_not_count(value):
    x = np.ones((8, 4), "float32")
    x[:, 2:] = -99999.0
    parts = [
        lambda: layers.Reshape((4, 1), dtype="float32"),
        lambda: mp.layers.Masking(value),
        dense(),
    ]
    model = made(*parts, shape=(4,))
    assert not found(model, "input-range", x)
    assert not found(made(*parts[1:], shape=(4, 1)), "input-range", x)  # Keras adds the axis
    inputs = keras.Input((4,))
    inside = made(*parts[1:], shape=(4, 1))
    nested = keras.Model(inputs, inside(parts[0]()(inputs)))
    assert not found(nested, "input-range", x)
    in_twos = made(
        lambda: layers.Reshape((2, 2), dtype="float32"),
        lambda: mp.layers.Masking(np.full((2,), -99999.0, "float32")),
        dense(),
        shape=(4,),
    )
    assert not found(in_twos, "input-range", x)
    x[0, 0] = 7e4  # not the mask value
    assert found(model, "input-range", x)


def test_a_dict_goes_by_the_names_of_inputs():
    second, first = keras.Input((3,), name="second"), keras.Input((5,), name="first")
    outputs = layers.Concatenate(dtype="mixed_float16")([second, first])
    model = keras.Model([second, first], layers.Dense(8)(outputs))
    x = {"first": np.ones((8, 5)), "second": LARGE[:, :3], "further": np.ones((8, 9))}
    model.predict_on_batch(x)
    assert only(model, "input-range", x).place == "input second"
    alone = keras.Model(second, layers.Dense(8)(second))
    assert not mp.lint(alone, x).errors


def test_only_the_input_that_is_too_large_is_named():
    small, large = keras.Input((8,), name="small"), keras.Input((8,), name="large")
    outputs = layers.Add(dtype="mixed_float16")([small, 2 * large])
    model = keras.Model({"small": small, "large": large}, layers.Dense(8)(outputs))
    each = only(model, "input-range", {"small": X, "large": LARGE})
    assert each.place == "input large"


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


# float-ids


class LooksUp(keras.Model):
    def __init__(self):
        super().__init__()
        self.rows, self.dense = layers.Embedding(6000, 4), layers.Dense(8, dtype="float32")

    def call(self, ids):
        return self.dense(self.rows(ids))


def test_ids_that_a_subclassed_model_rounds_are_an_error():
    """The model rounds floats before Embedding gets them, which would not round them."""
    ids = np.full((8, 4), 4001.0, "float32")
    for half in ("float16", "bfloat16"):
        with mp.policy_scope(f"mixed_{half}"):
            model = LooksUp()
        model(ids)
        assert f"rounded to {half}" in only(model, "float-ids", ids).reason
        for other in (ids.astype("int32"), ids / 100, ids - 3901.0):
            assert not found(model, "float-ids", other)
