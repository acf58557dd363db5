"""Gradients that are sums over a batch are summed in float32, in both half precisions.

In bfloat16 a sum of ones stops at 256, in float16 at 2048.
"""

import keras
import numpy as np
import pytest
from helpers import gradients, traced_casts
from helpers.marks import few, full, full_on, in_each_way

from kerasmp import layers

ROWS = 4096
BOTH = pytest.mark.parametrize("dtype", ["mixed_bfloat16", full("mixed_float16")])
STEPS, IMAGE, VOLUME = (64, 64, 2), (4, 32, 32, 2), (1, 16, 16, 16, 2)
WINDOW = {"kernel_size": 1}
# For each: class, arguments, shape of the inputs, and axes of the sum.
SUMS = {
    "Dense": ("Dense", {"units": 2}, (ROWS, 2), 0),
    # Keras adds these with another operation than longer ones.
    "Dense-one": ("Dense", {"units": 1}, (ROWS, 2), 0),
    "Dense-steps": ("Dense", {"units": 2}, STEPS, (0, 1)),
    "EinsumDense": (
        "EinsumDense",
        {"equation": "abc,cde->abde", "output_shape": (64, 2, 3), "bias_axes": "de"},
        STEPS,
        (0, 1),
    ),
    "EinsumDense-first": (
        "EinsumDense",
        {"equation": "abc,cd->abd", "output_shape": (2, 1), "bias_axes": "b"},
        (ROWS, 2, 2),
        (0, 2),
    ),
    "Conv1D": ("Conv1D", {"filters": 2, **WINDOW}, STEPS, (0, 1)),
    "Conv2D": ("Conv2D", {"filters": 2, **WINDOW}, IMAGE, (0, 1, 2)),
    "Conv3D": ("Conv3D", {"filters": 2, **WINDOW}, VOLUME, (0, 1, 2, 3)),
    "Conv1DTranspose": ("Conv1DTranspose", {"filters": 2, **WINDOW}, STEPS, (0, 1)),
    "Conv2DTranspose": ("Conv2DTranspose", {"filters": 2, **WINDOW}, IMAGE, (0, 1, 2)),
    "Conv3DTranspose": ("Conv3DTranspose", {"filters": 2, **WINDOW}, VOLUME, (0, 1, 2, 3)),
    "DepthwiseConv1D": ("DepthwiseConv1D", WINDOW, STEPS, (0, 1)),
    "DepthwiseConv2D": ("DepthwiseConv2D", WINDOW, IMAGE, (0, 1, 2)),
    "SeparableConv1D": ("SeparableConv1D", {"filters": 2, **WINDOW}, STEPS, (0, 1)),
    "SeparableConv2D": ("SeparableConv2D", {"filters": 2, **WINDOW}, IMAGE, (0, 1, 2)),
}


def upstreams(shape):
    """Yield gradients of outputs: ones, and numbers of both signs, exact in half precision."""
    yield np.ones(shape)
    yield np.random.default_rng(0).integers(-16, 17, shape) / 16


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@in_each_way
@BOTH
@pytest.mark.parametrize("name", few(SUMS, ["Dense", "Conv2D"]))
def test_the_gradient_of_a_bias_is_a_float32_sum(name, dtype, mode):
    cls, arguments, shape, axes = SUMS[name]
    layer = getattr(layers, cls)(**arguments, dtype=dtype)
    layer.build(shape)
    run = gradients.compile_(layer, [layer.bias], mode)
    inputs = [np.zeros(shape, "float16")]
    for upstream in upstreams(layer.compute_output_shape(shape)):
        _, found = run(inputs, [upstream])
        wanted = np.sum(upstream, axes).reshape(layer.bias.shape)
        assert error(found[-1], wanted) < 2.0**-9


@pytest.mark.backend("tensorflow")
def test_the_gradient_of_a_bias_of_one_number_is_not_rounded_either():
    """Keras adds it with another operation, whose gradient is a float16 sum."""
    layer = layers.Dense(1, dtype="mixed_float16")
    layer.build((4097, 2))
    run = gradients.compile_(layer, [layer.bias], "quick")
    _, found = run([np.zeros((4097, 2), "float16")], [np.ones((4097, 1))])
    assert found[-1] == 4097  # float16 has 4096 and 4100, and nothing between


@pytest.mark.backend("tensorflow")
def test_the_gradient_of_a_kernel_is_one_whichever_convolutions_the_cpu_has():
    """The kernels of oneDNN sum bfloat16 in float32, and the tests run without oneDNN."""
    layer = layers.Conv1D(1, 1, use_bias=False, dtype="mixed_bfloat16")
    layer.build((1, 257, 1))
    run = gradients.compile_(layer, [layer.kernel], "quick")
    values = np.array([256.0] + [1.0] * 256).reshape(1, 257, 1)
    _, found = run([values.astype("float16")], None)
    assert found[-1] == 512


# Layers whose gradients are not plain sums: their arguments, and the shape of the inputs.
OTHERS = {
    "LSTM": ({"units": 2}, (ROWS, 2, 3)),
    "LSTM-one-by-one": ({"units": 2, "implementation": 1}, (ROWS, 2, 3)),
    "GRU": ({"units": 2, "reset_after": False}, (ROWS, 2, 3)),
    "GRU-unrolled": ({"units": 2, "reset_after": False, "unroll": True}, (ROWS, 1, 3)),
    "MultiHeadAttention": ({"num_heads": 2, "key_dim": 2}, (64, 64, 3)),
    "GroupQueryAttention": (
        {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 2},
        (64, 64, 3),
    ),
}


def called(layer, x):
    return layer(x, x) if "Attention" in type(layer).__name__ else layer(x)


def gradients_of_biases(layer, shape, weights, mode):
    """Return the gradients of all biases, for outputs of ones, by path."""
    called(layer, keras.Input(batch_shape=shape))
    for variable, value in zip(layer.trainable_variables, weights or [], strict=bool(weights)):
        variable.assign(value)
    biases = [v for v in layer.trainable_variables if v.name == "bias"]
    run = gradients.compile_(lambda x: called(layer, x), biases, mode)
    x = np.random.default_rng(0).integers(-8, 9, shape) / 8
    _, found = run([x.astype("float16")], None)
    names = [v.path.partition("/")[2] for v in biases]
    return dict(zip(names, found[-len(biases) :], strict=True))


@full_on("jax")
@in_each_way
@BOTH
@pytest.mark.parametrize("name", few(OTHERS, ["GRU-unrolled", "MultiHeadAttention"]))
def test_bias_gradients_of_layers_with_inner_products_are_float32_sums(name, dtype, mode):
    arguments, shape = OTHERS[name]
    cls = name.partition("-")[0]
    stock = getattr(keras.layers, cls)(**arguments, dtype="float32")
    called(stock, keras.Input(batch_shape=shape))
    random = np.random.default_rng(1)
    weights = [random.integers(-8, 9, v.shape) / 16 for v in stock.trainable_variables]
    wanted = gradients_of_biases(stock, shape, weights, mode)
    ours = getattr(layers, cls)(**arguments, dtype=dtype)
    for path, found in gradients_of_biases(ours, shape, weights, mode).items():
        if not path.startswith("key/"):  # a bias of the keys does not change attention
            assert error(found, wanted[path]) < 2.0**-6, path


# ------------------------------------------------------------------------------------ embeddings

IDS = np.array([[0, 1] * 2048, [2, 0] * 2048], "int32")


def embedding(dtype="mixed_bfloat16", **arguments):
    layer = layers.Embedding(4, 3, dtype=dtype, **arguments)
    layer.build()
    return layer


@in_each_way
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_the_gradient_of_a_row_is_a_float32_sum(dtype, mode):
    layer = embedding(dtype)
    run = gradients.compile_(layer, [layer.embeddings], mode)
    for upstream in upstreams((*IDS.shape, 3)):
        wanted = np.zeros((4, 3))
        np.add.at(wanted, IDS, upstream)
        _, (found,) = run([IDS], [upstream])
        assert error(found, wanted) < 2.0**-20


def test_no_copy_is_made_of_the_table():
    """Only the rows that are looked up are cast."""
    layer = embedding("mixed_float16")
    if keras.backend.backend() == "torch":
        outputs = layer(IDS)
        assert outputs.grad_fn.next_functions[0][0].name() == "EmbeddingBackward0"
    else:
        assert traced_casts.count(layer, IDS, [layer.embeddings.shape]) == (0, 0)


@pytest.mark.backend("tensorflow")
def test_gradients_of_a_table_stay_sparse():
    import tensorflow as tf

    layer = embedding()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(IDS))
    gradient = tape.gradient(loss, layer.embeddings.value)
    assert isinstance(gradient, tf.IndexedSlices)
    assert gradient.values.dtype == "float32"


def test_lora_is_summed_and_saved_in_float32():
    layer = embedding("mixed_bfloat16", lora_rank=2)
    table, a, b = (
        np.random.default_rng(i).normal(size=v.shape) for i, v in enumerate(layer.weights)
    )
    layer.set_weights([table, a, b])
    wanted = table + a @ b
    np.testing.assert_allclose(gradients.numpy(layer.embeddings), wanted, rtol=1e-6)
    store = {}
    layer.save_own_variables(store)
    np.testing.assert_allclose(gradients.numpy(store["0"]), wanted, rtol=1e-6)
    run = gradients.compile_(layer, layer.trainable_variables, "quick")
    _, (of_a, of_b) = run([IDS], None)
    counts = np.array([4096, 2048, 2048, 0])[:, None]
    ones = np.ones((1, 3))
    np.testing.assert_allclose(of_a, counts * ones @ b.T, rtol=1e-5)
    np.testing.assert_allclose(of_b, (a * counts).sum(0)[:, None] * ones, rtol=1e-5)


@pytest.mark.full
def test_an_embedding_is_quantized_like_a_stock_one():
    found = []
    for package in (layers, keras.layers):
        keras.utils.set_random_seed(0)
        layer = package.Embedding(4, 3, dtype="mixed_bfloat16")
        layer(IDS)
        layer.quantize("int8")
        assert layer.quantization_mode == "int8"
        found.append(gradients.numpy(layer(IDS)))
    np.testing.assert_allclose(*found, rtol=2.0**-7)


def test_an_embedding_within_time_distributed_is_quantized_too():
    layer = embedding()
    layer.set_weights([np.arange(12.0).reshape(4, 3)])
    layer.quantize("int8")
    within = keras.layers.TimeDistributed(layer, dtype="mixed_bfloat16")(IDS[:, :4, None])
    wanted = gradients.numpy(layer(IDS[:, :4]))
    assert wanted.max() == 8  # of the rows 0, 1 and 2
    np.testing.assert_array_equal(gradients.numpy(within)[:, :, 0], wanted)


class Derived(layers.Embedding):
    pass


def test_a_subclass_of_the_embedding_is_not_quantized():
    layer = Derived(4, 3)
    layer.build()
    with pytest.raises(NotImplementedError, match="quantize"):
        layer.quantize("int8")


def test_a_projection_of_attention_is_named_as_in_stock_keras():
    """Policies saved as text by earlier versions have Keras's name."""
    layer = layers.MultiHeadAttention(2, 2)
    layer.build((1, 3, 4), (1, 3, 4))
    assert keras.saving.get_registered_name(type(layer.query_dense)) == "EinsumDense"
