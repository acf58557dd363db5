"""Dense layers and convolutions equal those of Keras; test_hazards.py has their errors."""

import keras
import numpy as np
import pytest
from helpers.float16 import numpy_of
from helpers.marks import few, full, marks_on
from keras import ops

from kerasmp import layers
from kerasmp.backend import current

pytestmark = marks_on("jax")

BACKEND = keras.backend.backend()
ARGUMENTS = {
    "Dense": {"units": 4},
    "EinsumDense": {"equation": "abc,cd->abd", "output_shape": (None, 4), "bias_axes": "d"},
    "Conv1D": {"filters": 4, "kernel_size": 3},
    "Conv2D": {"filters": 4, "kernel_size": 3},
    "Conv3D": {"filters": 2, "kernel_size": 3},
    "Conv1DTranspose": {"filters": 4, "kernel_size": 3},
    "Conv2DTranspose": {"filters": 4, "kernel_size": 3},
    "Conv3DTranspose": {"filters": 2, "kernel_size": 3},
    "DepthwiseConv1D": {"kernel_size": 3},
    "DepthwiseConv2D": {"kernel_size": 3},
    "SeparableConv1D": {"filters": 4, "kernel_size": 3},
    "SeparableConv2D": {"filters": 4, "kernel_size": 3},
}


def make(module, name, dtype, **kwargs):
    return getattr(module, name)(dtype=dtype, **{**ARGUMENTS[name], **kwargs})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_bias_of_another_axis_than_the_last_is_added_along_its_own(dtype):
    """Also if the last axis has the same size."""
    outputs = ops.zeros((1, 2, 3, 2), dtype)
    bias = ops.reshape(ops.array([1.0, 2.0]), (1, 2, 1, 1))
    found = current().add_bias(outputs, bias)
    wanted = np.broadcast_to([[[[1.0]], [[2.0]]]], outputs.shape)
    np.testing.assert_array_equal(numpy_of(ops.cast(found, "float32")), wanted)


SMALL = {1: (2, 6, 3), 2: (2, 6, 6, 3), 3: (1, 4, 4, 4, 3)}


def small(name):
    return next((shape for rank, shape in SMALL.items() if f"{rank}D" in name), SMALL[1])


def small_pair(name, ours="mixed_float16", stock="mixed_float16", **kwargs):
    made = [
        make(module, name, d, **kwargs) for module, d in ((layers, ours), (keras.layers, stock))
    ]
    random = np.random.default_rng(1)
    for layer in made:
        layer.build(small(name))
    weights = [random.normal(size=w.shape) * 0.5 for w in made[0].get_weights()]
    for layer in made:
        layer.set_weights(weights)
    return made


# One for each path through their code.
QUICK = ["Dense", "EinsumDense", "Conv2D", "SeparableConv1D"]


@pytest.mark.parametrize("name", few(ARGUMENTS, QUICK))
def test_it_equals_the_stock_layer_up_to_rounding(name):
    x = np.random.default_rng(2).normal(size=small(name)).astype("float16")
    arguments = {"activation": "gelu", "kernel_regularizer": "l2"}
    if name.startswith(("Depthwise", "Separable")):
        arguments = {"activation": "gelu", "depthwise_regularizer": "l2"}
    ours, stock = small_pair(name, **arguments)
    got, want = ours(x), stock(x)
    assert keras.backend.standardize_dtype(got.dtype) == "float16"
    assert ours(keras.Input(batch_shape=x.shape)).dtype == "float16"
    np.testing.assert_allclose(numpy_of(got), numpy_of(want), rtol=4e-3, atol=4e-3)
    assert {v.dtype for v in ours.variables} == {"float32"}
    assert len(ours.losses) == len(stock.losses) == 1
    assert ours.activation is keras.activations.gelu
    assert ours.get_config() | {"name": ""} == stock.get_config() | {"name": ""}


# All arguments of a convolution; the other layers have only the size.
SETTINGS = [
    *[(name, {}) for name in QUICK],
    ("Conv1D", {"padding": "causal", "dilation_rate": 2}),
    ("Conv1D", {"padding": "causal", "strides": 2, "groups": 3, "filters": 6}),
    ("Conv2D", {"padding": "same", "strides": (2, 1)}),
    ("Conv3D", {"padding": "same", "strides": 2}),
    ("Conv1DTranspose", {"strides": 2, "output_padding": 1, "padding": "same"}),
    ("Conv3DTranspose", {"strides": (2, 1, 1)}),
    ("DepthwiseConv1D", {"depth_multiplier": 2, "padding": "same"}),
    ("DepthwiseConv2D", {"dilation_rate": 2, "depth_multiplier": 2}),
    ("SeparableConv1D", {"dilation_rate": 2, "padding": "same"}),
    ("SeparableConv2D", {"strides": 2, "depth_multiplier": 2}),
]
if BACKEND != "tensorflow":  # whose CPU kernels support none of these
    SETTINGS += [
        ("Conv2DTranspose", {"dilation_rate": 2}),
        ("Conv1D", {"data_format": "channels_first", "padding": "causal"}),
        ("Conv2DTranspose", {"data_format": "channels_first"}),
        ("DepthwiseConv2D", {"data_format": "channels_first"}),
        ("SeparableConv2D", {"data_format": "channels_first"}),
    ]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_a_float32_layer_equals_the_stock_one_bit_for_bit(name, settings):
    x = np.random.default_rng(2).normal(size=small(name)).astype("float32")
    ours, stock = small_pair(name, "float32", "float32", activation="tanh", **settings)
    np.testing.assert_array_equal(numpy_of(ours(x)), numpy_of(stock(x)))


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("Dense", "float16"),
        ("Conv2D", "mixed_bfloat16"),
        full("Dense", "mixed_bfloat16"),
        full("Conv2D", "float16"),
        full("DepthwiseConv2D", "mixed_bfloat16"),
        full("DepthwiseConv2D", "float16"),
    ],
)
def test_other_policies(name, policy):
    x = np.random.default_rng(2).normal(size=small(name)).astype("float16")
    ours, _ = small_pair(name, policy, policy)
    assert keras.backend.standardize_dtype(ours(x).dtype) == ours.compute_dtype
    reference, _ = small_pair(name, "float32", "float32")
    np.testing.assert_allclose(numpy_of(ours(x)), numpy_of(reference(x)), rtol=4e-2, atol=4e-2)


def test_layers_without_bias():
    for name in ("Dense", "Conv1D"):
        ours, stock = small_pair(name, use_bias=False)
        x = np.ones(small(name), "float16")
        np.testing.assert_allclose(numpy_of(ours(x)), numpy_of(stock(x)), rtol=4e-3, atol=4e-3)


def test_dense_passes_masks_on():
    x = keras.layers.Embedding(5, 3, mask_zero=True)(np.array([[1, 2, 0]]))
    assert numpy_of(layers.Dense(2)(x)._keras_mask).tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("name", ["Dense", full("EinsumDense"), "Conv2D"])
def test_lora_is_trained_and_saved(name):
    ours, _ = small_pair(name)
    x = np.random.default_rng(2).normal(size=small(name)).astype("float16")
    before = numpy_of(ours(x))
    ours.enable_lora(2)
    np.testing.assert_allclose(numpy_of(ours(x)), before, rtol=4e-3, atol=4e-3)
    assert keras.backend.standardize_dtype(ours(x).dtype) == "float16"


def quantized(layer, mode):
    layer.quantize(mode)
    return layer


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("Dense", "int8"),
        ("EinsumDense", "int4"),
        *[full(n, m) for n, m in (("Dense", "int4"), ("EinsumDense", "int8"))],
        *[full(n, "float8") for n in ("Dense", "EinsumDense")],
    ],
)
def test_it_is_quantized_like_the_stock_layer(name, mode):
    x = np.random.default_rng(2).normal(size=small(name)).astype("float32")
    pair = small_pair(name, "float32", "float32", activation="tanh")
    ours, stock = (quantized(layer, mode) for layer in pair)
    assert ours.dtype_policy.name == stock.dtype_policy.name
    np.testing.assert_array_equal(numpy_of(ours(x)), numpy_of(stock(x)))
    # A subclass that overrides `call` cannot be quantized.
    other = type("Own", (type(ours),), {}).from_config({**ours.get_config(), "dtype": "float32"})
    other.build(small(name))
    with pytest.raises(NotImplementedError, match="Own does not have a `quantize` method"):
        other.quantize(mode)


# Under TimeDistributed Keras calls a layer with inputs in the dtype of TimeDistributed.
@pytest.mark.parametrize(
    ("name", "outer", "inner"),
    [
        ("Dense", "mixed_float16", "float32"),
        ("Conv1D", "mixed_float16", "float32"),
        ("Dense", "float32", "mixed_bfloat16"),
        full("Conv1D", "float32", "mixed_float16"),
        full("EinsumDense", "mixed_bfloat16", "mixed_float16"),
    ],
)
def test_within_time_distributed_the_outputs_have_its_dtype(name, outer, inner):
    x = np.random.default_rng(2).normal(size=(2, *small(name))).astype("float16")
    got, want = (
        keras.layers.TimeDistributed(layer, dtype=outer)
        for layer in small_pair(name, inner, inner, activation="relu")
    )
    outputs = got(x)
    symbol = got.compute_output_spec(keras.KerasTensor(x.shape))
    assert keras.backend.standardize_dtype(outputs.dtype) == symbol.dtype
    np.testing.assert_allclose(numpy_of(outputs), numpy_of(want(x)), rtol=2e-2, atol=2e-2)


def test_within_time_distributed_it_is_still_quantized():
    """Stock Keras multiplies by an int8 kernel there as if it held the numbers themselves."""
    dense = quantized(small_pair("Dense", "float32", "float32")[0], "int8")
    x = np.random.default_rng(2).normal(size=small("Dense")).astype("float32")
    outputs = keras.layers.TimeDistributed(dense)(x)
    np.testing.assert_allclose(numpy_of(outputs), numpy_of(dense(x)), rtol=1e-6)


INT8, FLOAT8 = "int8_from_mixed_bfloat16", "float8_from_mixed_float16"


@pytest.mark.parametrize(
    ("name", "policy"),
    [("Dense", INT8), ("EinsumDense", FLOAT8), full("Dense", FLOAT8), full("EinsumDense", INT8)],
)
def test_a_quantized_layer_keeps_the_compute_dtype(name, policy):
    ours = make(layers, name, policy, activation="relu")
    x = np.random.default_rng(2).normal(size=small(name)).astype("float16")
    assert keras.backend.standardize_dtype(ours(x, training=True).dtype) == ours.compute_dtype
    assert ours.activation is keras.activations.relu


def test_an_activation_that_fails_is_not_lost():
    def fails(_):
        message = "no"
        raise RuntimeError(message)

    layer = layers.Dense(2, activation=fails)
    with pytest.raises(RuntimeError, match="no"):
        layer(np.ones((1, 2)))
    assert layer.activation is fails
    with pytest.raises(ValueError, match="incompatible"):
        small_pair("Conv2D")[0](np.ones((1, 6, 6, 5)))


def test_a_model_trains():
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.SeparableConv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=BACKEND == "tensorflow")
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 1))
    history = model.fit(x, np.ones((8, 2)), epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert all(np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True))
    assert ops.shape(model(x)) == (8, 2)
