"""Masking: a mask value that half precision rounds still masks its steps."""

import keras
import numpy as np
import pytest
from helpers.gradients import numpy
from helpers.marks import full, full_on
from keras import ops

import kerasmp as mp

MASK = [[True, True, False, False]]


def steps(value, dtype="float32"):
    """Return four steps: two are masked, and a third has the mask value in one feature only."""
    x = np.ones((1, 4, 2), "float32")
    x[:, 1, 0] = x[:, 2:] = value
    return ops.cast(ops.convert_to_tensor(x), dtype)


def assert_masked(outputs, half):
    assert numpy(outputs._keras_mask).tolist() == MASK
    assert keras.backend.standardize_dtype(outputs.dtype) == half
    assert numpy(outputs)[0, 0].tolist() == [1, 1]
    assert not numpy(outputs)[0, 2:].any()


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("value", [0.1, -5000.3, -99999.0, -9999, np.float32(0.1)])
def test_steps_are_masked_whatever_the_dtype_of_the_inputs(value, half):
    layer = mp.layers.Masking(value, dtype=f"mixed_{half}")
    for dtype in ("float32", half):
        x = steps(value, dtype)
        assert_masked(layer(x), half)
        assert numpy(layer.compute_mask(x)).tolist() == MASK


def test_a_value_that_only_rounds_to_the_mask_value_is_not_masked():
    layer = mp.layers.Masking(0.1, dtype="mixed_float16")
    near = np.full((1, 1, 2), np.float16(0.1), "float32")
    assert numpy(layer(near)._keras_mask).tolist() == [[True]]


class RoundsItsInputs(mp.Model):
    def __init__(self, value):
        super().__init__()
        self.masking = mp.layers.Masking(value)
        self.pool = mp.layers.GlobalAveragePooling1D()

    def call(self, inputs):
        return self.pool(self.masking(inputs))


@pytest.mark.parametrize("value", [-5000.3, -99999.0])
def test_models_pass_the_mask_on(value):
    x = steps(value)
    with mp.policy_scope("mixed_float16"):
        model = mp.Sequential(
            [keras.Input((4, 2)), mp.layers.Masking(value), mp.layers.GlobalAveragePooling1D()]
        )
        rounding = RoundsItsInputs(value)
    wanted = [[(1 + value) / 2, 1]] if value > -65504 else None
    for each in (model, rounding):
        found = numpy(each(x))
        assert found[0, 1] == 1
        assert wanted is None or np.allclose(found, wanted, rtol=1e-3)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_a_converted_model_masks_by_the_kerasmp_layer_or_by_the_rule(half):
    model = keras.Sequential([keras.Input((4, 2)), keras.layers.Masking(0.1), keras.layers.ReLU()])
    layer = model.layers[0]
    for how, dtype in (({"safe_layers": True, "rules": None}, half), ({}, "float32")):
        report = mp.convert(model, f"mixed_{half}", **how)
        assert layer.autocast is (not how)  # the kerasmp layer sees inputs before rounding
        if how or keras.backend.backend() == "tensorflow":
            assert_masked(layer(steps(0.1)), dtype)
        report.restore()
        assert (type(layer), layer.autocast) == (keras.layers.Masking, True)


VALUE = 100.1  # 100.125 in float16


def recurrent(policy, *before, module=keras):
    """Return a model whose graph keeps the mask: LSTM has the dtype of its input."""
    keras.utils.set_random_seed(0)
    with mp.policy_scope(policy):
        parts = [*(part() for part in before), keras.layers.Masking(VALUE), keras.layers.LSTM(3)]
        return module.Sequential([keras.Input((4, 2)), *parts, keras.layers.ReLU()])


def rounds():
    return keras.layers.Reshape((4, 2))


@full_on("jax")
@pytest.mark.parametrize(
    ("built", "before"),
    [("float32", [rounds]), full("mixed_float16", [rounds]), ("mixed_float16", [])],
)
def test_a_mask_kept_by_a_graph_is_that_of_the_replaced_layer(built, before, tmp_path):
    x = numpy(steps(VALUE)).astype("float32")
    if not before:
        x[:, 1] = 100.125  # which is compared before rounding
    wanted = numpy(recurrent("float32")(x))
    model = recurrent(built, *before)
    before = numpy(model(x))
    report = mp.convert(model, "mixed_float16", safe_layers=True)
    found = numpy(model(x))
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), found)
    report.restore()
    np.testing.assert_array_equal(numpy(model(x)), before)


@pytest.mark.filterwarnings("ignore:Stock Keras models will not follow")
@pytest.mark.keras("3.14")  # before, Keras loses a mask where a layer casts its input
@pytest.mark.backend("tensorflow")
def test_a_mask_kept_by_a_graph_is_that_of_a_layer_under_the_rule(tmp_path):
    x = steps(VALUE)
    wanted = numpy(recurrent("float32")(x))
    model = recurrent("mixed_float16")
    before = numpy(model(x))
    assert np.abs(before - wanted).max() > 0.05
    report = mp.convert(model, "mixed_float16")
    made = recurrent(mp.Policy("mixed_float16", rules="safe"), module=mp)
    model.save(tmp_path / "model.keras")
    for each in (model, made, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(numpy(each(x)), wanted, atol=2e-3)
    report.restore()
    np.testing.assert_array_equal(numpy(model(x)), before)


class Holds(keras.Model):
    """A user-defined model, which rounds inputs under a policy, with a graph that widens them."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def call(self, inputs):
        return self.part(inputs)


@full_on("jax")
@pytest.mark.parametrize("how", [{}, full({"safe_layers": True})], ids=str)
@pytest.mark.parametrize("value", [full(VALUE), -99999.0])
def test_a_model_that_holds_a_graph_rounds_no_value(value, how):
    model = Holds(keras.Sequential([keras.Input((4, 2)), keras.layers.Masking(value)]))
    x = steps(value)
    model(x)
    report = mp.convert(Holds(model), sample=x, **how)  # at any depth
    assert '"safe", data' in report.rows[0].reason
    assert not numpy(report.model(x))[0, 2:].any()
    assert numpy(report.model(x)._keras_mask).tolist() == MASK


@full_on("jax")
@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_before_it_that_passes_values_on_does_not_round_them(nested):
    part = keras.Sequential([keras.Input((4, 2)), keras.layers.Masking(-99999.0)])
    inputs = keras.Input((2, 4))
    x = keras.layers.Permute((2, 1), name="permute")(inputs)
    model = keras.Model(inputs, part(x) if nested else part.layers[0](x))
    report = mp.convert(model)
    outputs = report.model(ops.transpose(steps(-99999.0), (0, 2, 1)))
    assert numpy(outputs._keras_mask).tolist() == MASK
    assert model.get_layer("permute").compute_dtype == "float32"


def test_integers_are_not_rounded():
    x = np.array([[[3, 3], [1, 3]]], "int32")
    outputs = mp.layers.Masking(3, dtype="mixed_float16")(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == "int32"
    assert numpy(outputs).tolist() == [[[0, 0], [1, 3]]]
