"""Normalization: raw data of any range, float32 statistics, outputs in the compute dtype."""

import keras
import numpy as np
import pytest
from helpers.float16 import assert_near_best, numpy_of
from helpers.marks import full, full_on, in_each_way
from keras import ops

from kerasmp.layers import Normalization

Stock = keras.layers.Normalization
# Mean and standard deviation of raw data that float16 cannot hold.
RANGES = {
    "wide": (0.0, 5000.0),
    "far": (1e6, 3e4),
    "narrow": (0.0, 1e-4),
    "offset": (1000.0, 0.5),
}


def raw(mean, std):
    x = np.random.default_rng(0).normal(mean, std, (64, 3)).astype("float32")
    return x, (x - x.mean(0, dtype="float64")) / x.std(0, dtype="float64")


def fixed(cls, x):
    mean, variance = x.mean(0, dtype="float64"), x.var(0, dtype="float64")
    layer = cls(mean=mean.tolist(), variance=variance.tolist(), dtype="mixed_float16")
    layer.build(x.shape)
    return layer


def adapted(cls, x):
    layer = cls(dtype="mixed_float16")
    layer.adapt(x)
    return layer


def compiled(mode, function):
    if mode == "jit":
        import jax

        return jax.jit(function)
    if mode == "eager":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=mode == "xla")


@in_each_way
@pytest.mark.parametrize(
    ("kind", "made"),
    # test_hazards.py has more with a fixed mean and variance.
    [("far", adapted), ("narrow", fixed), full("wide", adapted), full("offset", adapted)],
)
def test_outputs_are_within_four_times_the_best(kind, made, mode):
    x, expected = raw(*RANGES[kind])
    layer = made(Normalization, x)
    outputs = compiled(mode, layer)(ops.convert_to_tensor(x))
    assert keras.backend.standardize_dtype(outputs.dtype) == "float16"
    assert_near_best(numpy_of(outputs), expected)


@full_on("jax")
def test_functional_and_sequential_models_pass_raw_inputs_on(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    x, expected = raw(1e6, 3e4)
    inputs = keras.Input((3,))
    functional = keras.Model(inputs, adapted(Normalization, x)(inputs))
    for model in (functional, keras.Sequential([keras.Input((3,)), adapted(Normalization, x)])):
        assert model.outputs[0].dtype == "float16"
        assert_near_best(model.predict(x, verbose=0).astype("float64"), expected)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.layers[-1]) is Normalization
        assert_near_best(numpy_of(loaded(x)), expected)


def test_a_subclassed_model_must_not_cast_its_inputs():
    x, expected = raw(1e6, 3e4)

    class Subclassed(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(dtype="mixed_float16", **kwargs)
            self.scale = adapted(Normalization, x)

        def call(self, inputs):
            return self.scale(inputs)

    assert not np.any(np.isfinite(numpy_of(Subclassed()(x))))
    assert_near_best(numpy_of(Subclassed(autocast=False)(x)), expected)


@full_on("jax")
@pytest.mark.parametrize(
    ("policy", "invert"),
    [
        ("mixed_float16", False),
        ("mixed_bfloat16", True),
        full("mixed_float16", True),
        full("mixed_bfloat16", False),
        full("float32", False),
        full("float32", True),
    ],
)
def test_config_shapes_and_values_otherwise_equal_the_stock_layer(policy, invert):
    x, _ = raw(3.0, 2.0)
    layer, stock = (
        cls(mean=3.0, variance=4.0, axis=None, invert=invert, dtype=dtype, name="n")
        for cls, dtype in ((Normalization, policy), (Stock, "float32"))
    )
    assert {**layer.get_config(), "dtype": 0} == {**stock.get_config(), "dtype": 0}
    assert Normalization.from_config(layer.get_config()).get_config() == layer.get_config()
    symbolic = layer(keras.Input((3,)))
    outputs = layer(x)
    dtype = policy.removeprefix("mixed_")
    assert symbolic.dtype == keras.backend.standardize_dtype(outputs.dtype) == dtype
    assert layer.output_dtype == dtype
    assert layer.compute_dtype == "float32"
    expected = ops.cast(stock(x), dtype)
    np.testing.assert_array_equal(numpy_of(outputs), numpy_of(expected))


def test_integers_that_float16_would_round():
    layer = Normalization(mean=0.0, variance=2049.0**2, axis=None, dtype="mixed_float16")
    assert numpy_of(layer(np.array([[2049, -2049]]))).tolist() == [[1.0, -1.0]]


@pytest.mark.backend("tensorflow")
def test_a_data_pipeline_can_use_it():
    import tensorflow as tf

    x, expected = raw(1e6, 3e4)
    layer = adapted(Normalization, x)
    (outputs,) = tf.data.Dataset.from_tensors(x).map(layer)
    assert outputs.dtype == "float16"
    assert_near_best(outputs.numpy().astype("float64"), expected)
