"""SpectralNormalization: the float32 kernel stays float32."""

import keras
import numpy as np
import pytest
from helpers.float16 import numpy_of, rounded
from helpers.marks import full, marks_on

from kerasmp.layers import SpectralNormalization

pytestmark = marks_on("jax")

Stock = keras.layers.SpectralNormalization
EAGERLY = keras.backend.backend() == "tensorflow"  # compilation takes longer
INSIDE = {
    "Dense": (lambda dtype: keras.layers.Dense(4, dtype=dtype), (3, 5)),
    "Conv2D": (lambda dtype: keras.layers.Conv2D(4, 3, dtype=dtype), (2, 6, 6, 3)),
    "Embedding": (lambda dtype: keras.layers.Embedding(7, 4, dtype=dtype), (2, 3)),
}


def built(cls, kind, dtype="mixed_float16", **kwargs):
    make, shape = INSIDE[kind]
    layer = cls(make(dtype), dtype=dtype, **kwargs)
    layer.build(shape)
    random = np.random.default_rng(0)
    # Values that float16 would round.
    for variable in layer.variables:
        variable.assign(random.normal(size=variable.shape))
    if kind == "Embedding":
        return layer, random.integers(0, 7, size=shape)
    return layer, random.normal(size=shape).astype("float16")


def weight(layer):
    return numpy_of(layer.kernel)


@pytest.mark.parametrize("policy", ["mixed_float16", full("mixed_bfloat16")])
@pytest.mark.parametrize("kind", INSIDE)
def test_a_training_step_does_not_round_the_kernel(kind, policy):
    reference, x = built(Stock, kind, "float32")
    reference(x, training=True)
    ours, _ = built(SpectralNormalization, kind, policy)
    outputs = ours(x, training=True)
    np.testing.assert_allclose(weight(ours), weight(reference), rtol=1e-6)
    np.testing.assert_allclose(numpy_of(ours.vector_u), numpy_of(reference.vector_u), rtol=1e-5)
    if kind != "Embedding":
        assert keras.backend.standardize_dtype(outputs.dtype) == ours.compute_dtype


def test_a_training_step_in_a_mixed_model_does_not_round_the_kernel():
    """The autocast scope of the model encloses that of the layer."""
    keras.config.set_dtype_policy("mixed_float16")
    reference, x = built(Stock, "Dense", "float32")
    reference(x, training=True)
    layer, _ = built(SpectralNormalization, "Dense")
    model = keras.Sequential([keras.Input((5,)), layer])
    model(x, training=True)
    np.testing.assert_allclose(weight(layer), weight(reference), rtol=1e-6)


@pytest.mark.parametrize("power_iterations", [full(1), 3])
def test_inference_and_float32_equal_the_stock_layer(power_iterations):
    for dtype, training in (("mixed_float16", False), ("float32", True)):
        (ours, x), (stock, _) = (
            built(cls, "Dense", dtype, power_iterations=power_iterations)
            for cls in (SpectralNormalization, Stock)
        )
        for _ in range(2):
            np.testing.assert_array_equal(
                numpy_of(ours(x, training=training)), numpy_of(stock(x, training=training))
            )


def test_a_kernel_of_zeros_stays_zero():
    layer, x = built(SpectralNormalization, "Dense")
    layer.layer.kernel.assign(np.zeros((5, 4)))
    np.testing.assert_array_equal(
        numpy_of(layer(x, training=True)), rounded(np.tile(numpy_of(layer.layer.bias), (3, 1)))
    )
    assert not np.any(weight(layer))


def test_a_model_trains():
    keras.config.set_dtype_policy("mixed_float16")
    dense = keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((5,)), SpectralNormalization(dense)])
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=EAGERLY)
    x = np.random.default_rng(0).normal(size=(16, 5))
    model.fit(x, x.sum(-1), batch_size=8, epochs=2, verbose=0)
    kernel = numpy_of(dense.kernel)
    assert dense.kernel.dtype == "float32"
    assert np.any(kernel != rounded(kernel))
    assert np.all(np.isfinite(kernel))
