"""Variables in half precision: checked first, all or none, as if the model had been built so."""

import gc
import sys
import weakref

import keras
import numpy as np
import pytest
from helpers.marks import few, marks_on
from helpers.undoing import assigned, take_back

import kerasmp as mp
from kerasmp.conversion.convert import change_variables
from kerasmp.conversion.half_variables import plan_variables

pytestmark = marks_on("jax", "oldest")

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
    """Return a model whose values and statistics float16 must round."""
    model = build()
    rng = np.random.default_rng(5)
    model.set_weights([w + rng.uniform(0.01, 0.3, w.shape) for w in model.get_weights()])
    return model


def narrowed(model, dtype="float16"):
    """Narrow all layers and return the report, which holds the old values."""
    return mp.convert(model, dtype, rules=None, variables=dtype)


DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
# In bfloat16 Keras cannot build the recurrent layer by itself.
QUICK = [("vision", "float16"), ("text", "bfloat16")]
CASES = few([(kind, dtype) for kind in MODELS for dtype in ("float16", "bfloat16")], QUICK)


def floats(model):
    return [v for v in model.variables if "seed" not in v.path]


def dense(name="dense", units=2):
    layer = layers.Dense(units, name=name)
    layer.build((None, 3))
    return layer


def wanted(*parts, dtype="float16"):
    return [assigned(layer, dtype) for layer in parts]


def narrow_variables(rows, undo=None):
    """Change the dtypes of variables and return the change of each layer."""
    facts, changes = plan_variables(rows)
    change_variables(changes, [] if undo is None else undo)
    return facts


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_predictions_are_those_of_a_model_built_so(kind, dtype):
    build, x = MODELS[kind]
    model = lived_in(build)
    narrowed(model, dtype)
    keras.config.set_dtype_policy(dtype)
    other = build(recurrent_initializer="zeros") if kind == "text" else build()
    other.set_weights(model.get_weights())
    assert [v.dtype for v in floats(model)] == [v.dtype for v in floats(other)]
    assert model.outputs[0].dtype == other.outputs[0].dtype == dtype
    predicted = model.predict(x, verbose=0)
    assert predicted.dtype == other.predict(x, verbose=0).dtype
    np.testing.assert_array_equal(predicted, other.predict(x, verbose=0))
    np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(m(x)) for m in (model, other)))


@DTYPES
def test_recurrent_layers_can_be_built_with_half_precision_variables(dtype):
    layer = layers.GRU(4, recurrent_initializer=keras.initializers.Orthogonal(2.0, seed=3))
    layer.build((None, 5, 3))
    before = layer.cell.recurrent_initializer
    undo = []
    narrow_variables(wanted(layer, layer.cell, dtype=dtype), undo)
    config = layer.get_config()
    take_back(undo)
    assert layer.cell.recurrent_initializer is before
    other = layers.GRU.from_config({**config, "dtype": dtype})
    other.build((None, 5, 3))
    kernel = np.float32(keras.ops.convert_to_numpy(other.cell.recurrent_kernel.value))
    np.testing.assert_allclose(kernel, np.float32(layer.cell.recurrent_kernel), atol=0.01)


@DTYPES
def test_a_file_has_half_the_bytes_and_every_number_exactly(dtype, tmp_path):
    model = keras.Sequential([keras.Input((512,)), layers.Dense(512)])
    model.save(tmp_path / "whole.keras")
    narrowed(model, dtype)
    model.save(tmp_path / "half.keras")
    whole, half = ((tmp_path / f"{name}.keras").stat().st_size for name in ("whole", "half"))
    assert half < 0.55 * whole
    weights = keras.models.load_model(tmp_path / "half.keras").get_weights()
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_weights_files_load_again_and_wider_ones_load_too(tmp_path):
    wide, model, other = (keras.Sequential([keras.Input((3,)), dense()]) for _ in range(3))
    wide.save_weights(tmp_path / "wide.weights.h5")
    narrowed(model)
    narrowed(other)
    model.save_weights(tmp_path / "narrow.weights.h5")
    other.load_weights(tmp_path / "narrow.weights.h5")
    np.testing.assert_array_equal(other.get_weights()[0], model.get_weights()[0])
    other.load_weights(tmp_path / "wide.weights.h5")
    np.testing.assert_array_equal(other.get_weights()[0], wide.get_weights()[0].astype("float16"))


@pytest.mark.full
@pytest.mark.backend("tensorflow")
def test_an_exported_model_holds_the_narrow_variables(tmp_path):
    import tensorflow as tf

    model = lived_in(vision)
    narrowed(model)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    assert {v.dtype.name for v in served.variables} == {"float16"}
    outputs = served.serve(IMAGES.astype("float16"))
    np.testing.assert_array_equal(outputs, model.predict(IMAGES, verbose=0))


def test_bytes_and_errors_of_each_layer():
    layer = dense(units=3)
    kernel = np.array([[1.0, 1e-9, -1e-9], [0.0, 1 + 2.0**-11, 2.0], [4.0, 8.0, np.inf]])
    layer.kernel.assign(kernel)
    narrow, kept = dense("narrow"), dense("kept")
    narrow_variables(wanted(narrow))
    drop = layers.Dropout(0.5, seed=1)
    seed = drop.seed_generator.state.value
    rows = [*wanted(layer, narrow), *wanted(kept, dtype="float32"), *wanted(drop)]
    first, second, third = narrow_variables(rows)
    assert first[:4] == ("dense", 48, 24, 2)
    assert first.error == pytest.approx(2.0**-11, rel=1e-3)
    assert second == ("narrow", 16, 16, 0, 0.0)
    assert third[3:] == (0, 0.0)
    assert kept.kernel.dtype == "float32"
    assert drop.seed_generator.state.value is seed
    assert layer.kernel.numpy()[2, 2] == np.inf


def test_values_beyond_the_range_are_named_and_nothing_changes():
    fits, norm = dense(), layers.BatchNormalization(name="norm")
    norm.build((None, 3))
    norm.moving_variance.assign([1.0, 1e6, 2e6])
    before = [v.value for v in (*fits.variables, *norm.variables)]
    with pytest.raises(mp.errors.PolicyError) as caught:
        narrow_variables(wanted(fits, norm))
    said = str(caught.value)
    for words in ("moving_variance", '"norm"', "2e+06", "65504", 'rules={"norm": "float32"}'):
        assert words in said
    assert 'variables="bfloat16"' in said
    after = [v.value for v in (*fits.variables, *norm.variables)]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert {v.dtype for v in (*fits.variables, *norm.variables)} == {"float32"}
    narrow_variables(wanted(fits, norm, dtype="bfloat16"))
    np.testing.assert_allclose(np.float32(norm.moving_variance), [1, 1e6, 2e6], rtol=2.0**-8)


def test_the_largest_value_that_rounds_to_a_finite_number_fits():
    layer = dense()
    layer.bias.assign([65519.0, -65519.0])
    narrow_variables(wanted(layer))
    np.testing.assert_array_equal(layer.bias.numpy(), [65504, -65504])
    for value in (65520.0, -65520.0):
        other = dense()
        other.bias.assign([value, 0])
        with pytest.raises(mp.errors.PolicyError, match="65520"):
            narrow_variables(wanted(other))


def test_more_than_a_few_are_counted():
    parts = [dense(f"dense_{number}") for number in range(5)]
    for layer in parts:
        layer.bias.assign([1e5, 0])
    with pytest.raises(mp.errors.PolicyError, match="2 more variables") as caught:
        narrow_variables(wanted(*parts))
    assert '"dense_4": "float32"' in str(caught.value)
    for layer in parts:
        layer.bias.assign([3.4e38, 0])
        layer.kernel.assign(np.full((3, 2), 3.4028235e38))
    with pytest.raises(mp.errors.PolicyError) as caught:
        narrow_variables(wanted(*parts, dtype="bfloat16"))
    assert 'variables="bfloat16"' not in str(caught.value)


def test_taking_back_after_an_error_midway_leaves_all_as_it_was(monkeypatch):
    first, second = dense(), dense("second")
    before = [v.value for v in (*first.variables, *second.variables)]
    carried_out = sys.modules[
        change_variables.__module__
    ]  # `convert` of the package is the function
    change = carried_out.set_variable_dtype

    def failing(variable, dtype):
        if variable is second.bias:
            raise MemoryError
        return change(variable, dtype)

    monkeypatch.setattr(carried_out, "set_variable_dtype", failing)
    undo = []
    with pytest.raises(MemoryError):
        narrow_variables(wanted(first, second), undo)
    take_back(undo)
    after = [v.value for v in (*first.variables, *second.variables)]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert {v.dtype for v in (*first.variables, *second.variables)} == {"float32"}


def test_a_shared_variable_counts_once_and_needs_one_dtype():
    one, two = dense("one"), layers.Dense(2, name="two")
    two.kernel_of_one = one.kernel
    two.build((None, 3))
    with pytest.raises(mp.errors.PolicyError, match="share"):
        narrow_variables([*wanted(one), *wanted(two, dtype="float32")])
    first, second = narrow_variables(wanted(one, two))
    assert (first.bytes_after, second.bytes_after) == (16, 16)
    assert {v.dtype for v in (*one.variables, *two.variables)} == {"float16"}


def test_old_values_are_freed_with_the_undo():
    build, x = MODELS["vision"]
    model = lived_in(build)
    model.predict(x, verbose=0)
    torch = keras.backend.backend() == "torch"
    kept = [weakref.ref(v.value.untyped_storage() if torch else v.value) for v in floats(model)]
    narrowed(model)
    model.predict(x, verbose=0)
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)
