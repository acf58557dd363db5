"""Layers that compute in float32 between float16 tensors are near the best possible accuracy."""

import keras
import numpy as np
import pytest
from helpers.float16 import assert_near_best, draw, numpy_of, rounded, step
from helpers.marks import full_on, in_each_way
from keras import ops

from kerasmp import layers

# ----------------------------------------------------------------------------------------- masks


@full_on("jax")
@in_each_way
@pytest.mark.parametrize(
    ("data_format", "keepdims"),
    [("channels_last", False), ("channels_first", True)],
)
def test_global_pooling_of_masked_steps(data_format, keepdims, mode):
    x = draw(0, (3, 2000, 4), 1.0)
    x = rounded(x + 50)
    mask = np.arange(2000) < np.array([[1500], [0], [2000]])
    dy = draw(1, (3, 4), 5000.0)
    count = np.maximum(mask.sum(-1), 1)[:, None]
    expected = (x * mask[..., None]).sum(1) / count
    wanted = mask[..., None] * (dy / count)[:, None]
    axis = 1 if data_format == "channels_last" else 2
    if axis == 2:
        x, wanted = x.swapaxes(1, 2), wanted.swapaxes(1, 2)
    if keepdims:
        expected, dy = np.expand_dims(expected, axis), np.expand_dims(dy, axis)
    arguments = {"data_format": data_format, "keepdims": keepdims, "dtype": "mixed_float16"}
    kept = ops.convert_to_tensor(mask)
    layer = layers.GlobalAveragePooling1D(**arguments)
    outputs, (gradient,) = step(mode, lambda x: layer(x, mask=kept), [x], dy)
    assert outputs.shape == expected.shape
    assert_near_best(outputs, expected)
    assert_near_best(gradient, wanted)
    unmasked, _ = step(mode, layer, [x], dy)
    assert_near_best(unmasked, x.mean(axis, keepdims=keepdims))


@full_on("jax")
def test_a_mask_from_an_embedding_reaches_pooling():
    ids = np.array([[1, 2, 0], [0, 0, 0]])
    embed = keras.layers.Embedding(3, 4, mask_zero=True, dtype="mixed_float16")
    inputs = keras.Input((3,), dtype="int32")
    outputs = layers.GlobalAveragePooling1D(dtype="mixed_float16")(
        layers.Activation("tanh", dtype="mixed_float16")(embed(inputs))
    )
    pooled = numpy_of(keras.Model(inputs, outputs)(ids))
    rows = np.tanh(numpy_of(embed.embeddings))
    np.testing.assert_allclose(pooled[0], (rows[1] + rows[2]) / 2, atol=1e-3)
    assert not np.any(pooled[1])


def test_softmax_of_a_fully_masked_row_is_zero():
    mask = ops.convert_to_tensor([[True, True], [False, False]])
    outputs = layers.Softmax(dtype="mixed_float16")(np.ones((2, 2), "float16"), mask=mask)
    assert numpy_of(outputs).tolist() == [[0.5, 0.5], [0.0, 0.0]]


# ------------------------------------------------------------------- penalties on activations


def test_activity_penalties_are_float32():
    factors = {"l1": 0.5, "l2": 0.25}
    x = np.abs(draw(0, (32, 2000), 300.0))
    layer = layers.ActivityRegularization(**factors, dtype="mixed_float16")
    layer(ops.convert_to_tensor(x.astype("float32")))
    (loss,) = layer.losses
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    reference = keras.layers.ActivityRegularization(**factors, dtype="float32")
    reference(ops.convert_to_tensor(x.astype("float32")))  # over the batch, since Keras 3.13
    np.testing.assert_allclose(numpy_of(loss), numpy_of(reference.losses[0]), rtol=1e-5)
    total = (factors["l1"] * x + factors["l2"] * x**2).sum()
    ratio = total / numpy_of(loss)
    assert abs(ratio - 1) < 1e-5 or abs(ratio / len(x) - 1) < 1e-5


def test_a_model_with_a_penalty_trains():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, dtype="mixed_float16", kernel_initializer="ones"),
            layers.ActivityRegularization(l2=0.1, dtype="mixed_float16"),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    model.compile("sgd", "mse")
    loss = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0).history["loss"][0]
    assert loss > 12  # the penalty is 0.1 * 8 * 4**2


# ------------------------------------------------------------------------------------- contracts

# Arguments that change the path through the code; contracts/test_every_layer.py has plain layers.
MADE = {
    "AveragePooling1D": lambda **k: layers.AveragePooling1D(2, strides=1, padding="same", **k),
    "AveragePooling2D": lambda **k: layers.AveragePooling2D((2, 1), padding="same", **k),
    "Dot": lambda **k: layers.Dot([1, -1], normalize=True, **k),
    "GlobalAveragePooling1D": lambda **k: layers.GlobalAveragePooling1D(keepdims=True, **k),
    "PReLU": lambda **k: layers.PReLU("ones", shared_axes=[1], **k),
    "Softmax": lambda **k: layers.Softmax(axis=[1, 2], **k),
    "UnitNormalization": lambda **k: layers.UnitNormalization(axis=[1, 2], **k),
}
SHAPES = {"AveragePooling2D": (4, 4, 3), "Dot": (5, 5)}


@full_on("jax")
@pytest.mark.parametrize("name", MADE)
def test_config_shapes_and_values_otherwise_equal_the_stock_layer(name, tmp_path):
    layer = MADE[name](dtype="mixed_bfloat16", name="ours")
    stock = getattr(keras.layers, name).from_config({**layer.get_config(), "dtype": "float32"})
    assert isinstance(layer, getattr(keras.layers, name))
    assert {**layer.get_config(), "dtype": 0} == {**stock.get_config(), "dtype": 0}
    shape = SHAPES.get(name, (4, 3))
    count = 2 if name == "Dot" else 1
    sizes = (None, *shape[1:]) if name == "AveragePooling1D" else shape
    inputs = [keras.Input(sizes) for _ in range(count)]
    inputs = inputs if count > 1 else inputs[0]
    outputs = layer(inputs)
    assert outputs.dtype == layer.compute_dtype
    assert {v.dtype for v in layer.variables} <= {"float32"}
    model = keras.Model(inputs, outputs)
    x = [draw(seed, (2, *shape)).astype("float32") for seed in range(count)]
    x = x if count > 1 else x[0]
    got = model(x, training=True)
    assert keras.backend.standardize_dtype(got.dtype) == layer.compute_dtype
    assert all(n in (None, m) for n, m in zip(outputs.shape, got.shape, strict=True))
    np.testing.assert_allclose(numpy_of(got), numpy_of(stock(x)), rtol=2e-2, atol=2e-2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("ours")) is type(layer)
    assert loaded.get_layer("ours").get_config() == layer.get_config()
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(got))


@full_on("jax")
def test_dot_without_normalize_is_that_of_keras_and_uses_up_no_names():
    x = ops.convert_to_tensor(draw(0, (2, 4)).astype("float16"))
    for normalized in (False, True):
        layer = layers.Dot(1, normalize=normalized, dtype="mixed_float16")
        outputs = layer([x, x])
        if not normalized:
            stock = keras.layers.Dot(1, dtype="mixed_float16")([x, x])
            np.testing.assert_array_equal(numpy_of(outputs), numpy_of(stock))
    assert keras.layers.Dot(1).name == "dot_3"
    with pytest.raises(ValueError, match="2 inputs"):
        layers.Dot(1, normalize=True)([x, x, x])
