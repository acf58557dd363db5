"""Reductions and softmax of float16 tensors, forward and backward, against NumPy in float64."""

from functools import cache

import keras
import numpy as np
import pytest
from helpers.float16 import MODES, assert_near_best, draw, numpy_of, rounded, step
from helpers.marks import few, full, full_on, in_each_way
from helpers.references import (
    length,
    log_softmax,
    normalize,
    normalize_gradient,
    softmax,
    softmax_gradient,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from keras import ops

import kerasmp


def log_softmax_gradient(x, dy, axis=-1):
    return dy - softmax(x, axis) * dy.sum(axis, keepdims=True)


def _cumsum_gradient(x, dy):  # noqa: ARG001 - all gradients take both
    return dy[..., ::-1].cumsum(-1)[..., ::-1]


def _std_gradient(x, dy):
    distance, std = x - x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    return dy[..., None] * distance / x.shape[-1] / np.where(std == 0, 1, std)


# Name in kerasmp.ops, over the last axis: the exact function, and its gradient for an upstream one.
REDUCTIONS = {
    "cumsum": (lambda x: x.cumsum(-1), _cumsum_gradient),
    "log_softmax": (log_softmax, log_softmax_gradient),
    "logsumexp": (
        lambda x: x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)),
        lambda x, dy: dy[..., None] * softmax(x),
    ),
    "mean": (lambda x: x.mean(-1), lambda x, dy: dy[..., None] / x.shape[-1] + 0 * x),
    "norm": (lambda x: length(x)[..., 0], lambda x, dy: dy[..., None] * normalize(x)),
    "normalize": (normalize, normalize_gradient),
    "softmax": (softmax, lambda x, dy: softmax_gradient(softmax(x), dy)),
    "std": (lambda x: x.std(-1), _std_gradient),
    "sum": (lambda x: x.sum(-1), lambda x, dy: dy[..., None] + 0 * x),
    "var": (
        lambda x: x.var(-1),
        lambda x, dy: dy[..., None] * 2 * (x - x.mean(-1, keepdims=True)) / x.shape[-1],
    ),
}

# On JAX each is compiled: only those that are more than one call of Keras's function.
QUICK = {"cumsum", "logsumexp", "norm", "softmax", "std"}
ELEMENTWISE = {"cumsum", "log_softmax", "normalize", "softmax"}  # the shape is kept


@cache
def over_the_last_axis(name):
    function = getattr(kerasmp.ops, name)
    return lambda x: function(x, axis=-1)


def near_best(mode, name, x, upstream, seed=7):
    value, gradient_of = REDUCTIONS[name]
    dy = draw(seed, x.shape if name in ELEMENTWISE else x.shape[:-1], upstream)
    outputs, (gradient,) = step(mode, over_the_last_axis(name), [x], dy)
    assert_near_best(outputs, value(x))
    # If one probability is nearly 1, softmax's gradient is a difference that float32 rounds too.
    slack = 2.0**-22 * np.linalg.norm(softmax(x) * dy) if name == "softmax" else 0.0
    assert_near_best(gradient, gradient_of(x, dy), slack)


@in_each_way
@pytest.mark.parametrize("name", few(REDUCTIONS, QUICK, where=keras.backend.backend() == "jax"))
def test_values_and_gradients_are_within_four_times_the_best(name, mode):
    for seed, (shape, scale, upstream) in enumerate(
        [((2, 3000), 1.0, 1.0), ((3, 40), 300.0, 1.0), ((3, 40), 0.03, 50.0)]
    ):
        near_best(mode, name, rounded(draw(seed, shape, scale) + scale), upstream)


@pytest.mark.full
@pytest.mark.parametrize("name", REDUCTIONS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(1, 2), (4, 300)]),  # each is compiled once
    exponent=st.integers(-8, 12),
    upstream=st.integers(-2, 8),
)
@example(seed=0, shape=(1, 2), exponent=-14, upstream=0)
def test_any_magnitude_is_within_four_times_the_best(name, seed, shape, exponent, upstream):
    x = draw(seed, shape, 2.0**exponent)
    near_best(next(iter(MODES)), name, x, 2.0**upstream, seed + 1)


# Each way is quick: TensorFlow's kernel for the gradient of sqrt hides an error that XLA shows.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["norm", "normalize", "std"])
def test_rows_of_zeros_have_no_gradient_and_stay_zero(name, mode):
    x = draw(0, (4, 8), 300.0)
    x[1] = 0
    near_best(mode, name, x, 1.0)
    if name == "normalize":
        return
    _, (gradient,) = step(mode, over_the_last_axis(name), [x], np.ones(4))
    assert not np.any(gradient[1])


@pytest.mark.full
@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize("name", ["norm", "std"])
def test_rows_of_zeros_have_a_nan_gradient_in_stock_keras(name):
    x = draw(0, (4, 8), 300.0)
    x[1] = 0
    _, (gradient,) = step(MODES[-1], lambda x: getattr(ops, name)(x, axis=-1), [x], np.ones(4))
    assert np.any(np.isnan(gradient))


@full_on("jax")
@in_each_way
def test_normalize_takes_other_orders_and_axes(mode):
    x = draw(0, (3, 4, 5), 2000.0)
    x[0] = 0
    dy = draw(1, x.shape)
    outputs, (gradient,) = step(mode, lambda x: kerasmp.ops.normalize(x, order=3), [x], dy)
    length = (np.abs(x) ** 3).sum(-1, keepdims=True) ** (1 / 3)
    assert_near_best(outputs, x / np.where(length == 0, 1, length))
    assert not np.any(gradient[0])
    assert np.all(np.isfinite(gradient))
    outputs, _ = step(mode, lambda x: kerasmp.ops.normalize(x, axis=(1, 2)), [x], dy)
    length = np.sqrt((x**2).sum((1, 2), keepdims=True))
    assert_near_best(outputs, x / np.where(length == 0, 1, length))


@full_on("jax")
@pytest.mark.parametrize(
    ("axis", "keepdims"),
    [
        (None, False),
        ((0, 1), True),
        (0, False),
        full(None, True),
        full(0, True),
        full((0, 1), False),
    ],
)
@pytest.mark.parametrize("name", ["sum", "mean", "var", "std", "logsumexp", "norm"])
def test_axes_and_keepdims_are_those_of_keras(name, axis, keepdims):
    x = ops.convert_to_tensor(draw(0, (3, 4)).astype("float32"))
    ours = getattr(kerasmp.ops, name)(x, axis=axis, keepdims=keepdims)
    stock = getattr(ops, name)(x, axis=axis, keepdims=keepdims)
    assert ours.shape == stock.shape
    np.testing.assert_allclose(numpy_of(ours), numpy_of(stock), rtol=1e-6)


@full_on("jax")
@pytest.mark.parametrize("order", [1, 2, float("inf"), "fro"])
def test_orders_of_the_norm_are_those_of_keras(order):
    x = ops.convert_to_tensor(draw(0, (3, 4)).astype("float32"))
    axis = (0, 1) if order == "fro" else -1
    ours, stock = (f(x, ord=order, axis=axis) for f in (kerasmp.ops.norm, ops.norm))
    np.testing.assert_allclose(numpy_of(ours), numpy_of(stock), rtol=1e-6)


@full_on("jax")
@pytest.mark.parametrize("name", [*REDUCTIONS, "average_pool"])
@pytest.mark.parametrize("dtype", ["float16", full("bfloat16"), full("float32"), "int32"])
def test_dtypes_are_those_of_keras(name, dtype):
    if dtype == "int32" and name not in ("sum", "mean", "var", "std", "cumsum"):
        return
    x = ops.ones((1, 4, 4, 1), dtype)
    argument = {"pool_size": 2, "strides": 2} if name == "average_pool" else {"axis": 1}
    ours, stock = (getattr(package, name)(x, **argument) for package in (kerasmp.ops, ops))
    assert ours.dtype == stock.dtype
    symbol = keras.KerasTensor((1, 4, 4, 1), dtype)
    assert getattr(kerasmp.ops, name)(symbol, **argument).dtype == keras.backend.standardize_dtype(
        stock.dtype
    )


@in_each_way
def test_large_windows_are_averaged_near_best(mode):
    """test_hazards.py measures the layers, which do not call this function."""
    x = rounded(draw(0, (1, 2048, 2)) + 8)
    dy = np.full((1, 1, 2), 1000.0)
    outputs, (gradient,) = step(mode, lambda x: kerasmp.ops.average_pool(x, 2048), [x], dy)
    assert_near_best(outputs, x.mean(1, keepdims=True))
    assert_near_best(gradient, dy / 2048 + 0 * x)


# --------------------------------------------------------------------------------------- softmax


@in_each_way
def test_softmax_over_two_axes(mode):
    x, dy = rounded(draw(0, (3, 20, 30), 64.0) + 60000), draw(1, (3, 20, 30))
    flat, flat_dy = x.reshape(3, 600), dy.reshape(3, 600)
    outputs, (gradient,) = step(mode, lambda x: kerasmp.ops.softmax(x, axis=(1, 2)), [x], dy)
    assert_near_best(outputs, softmax(flat).reshape(x.shape))
    assert_near_best(gradient, softmax_gradient(softmax(flat), flat_dy).reshape(x.shape))
    outputs, (gradient,) = step(mode, lambda x: kerasmp.ops.log_softmax(x, axis=[1, 2]), [x], dy)
    assert_near_best(outputs, log_softmax(flat).reshape(x.shape))
    assert_near_best(gradient, log_softmax_gradient(flat, flat_dy).reshape(x.shape))


@pytest.mark.backend("tensorflow")
def test_softmax_over_two_axes_of_unknown_size():
    import tensorflow as tf

    unknown = tf.function(lambda x: kerasmp.ops.softmax(x, axis=(1, 2)))
    concrete = unknown.get_concrete_function(tf.TensorSpec((None, None, None), "float16"))
    outputs = concrete(tf.zeros((2, 4, 8), "float16"))
    np.testing.assert_array_equal(numpy_of(outputs), np.full((2, 4, 8), 1 / 32))


@in_each_way
def test_masked_entries_have_no_share_and_empty_rows_are_zero(mode):
    x = draw(0, (5, 8), 10000.0)
    mask = np.random.default_rng(0).random((5, 8)) > 0.5
    mask[2] = False
    x[0] = np.where(mask[0], -60000.0 + np.arange(8) * 32, 60000.0)
    dy = draw(1, x.shape)
    kept = ops.convert_to_tensor(mask)
    outputs, (gradient,) = step(mode, lambda x: kerasmp.ops.softmax(x, mask=kept), [x], dy)
    masked = np.where(mask, x, -1e9)
    assert_near_best(outputs, np.where(mask, softmax(masked), 0))
    assert_near_best(gradient, np.where(mask, softmax_gradient(softmax(masked), dy * mask), 0))
    assert np.all(outputs[~mask] == 0)
    logs, (gradient,) = step(mode, lambda x: kerasmp.ops.log_softmax(x, mask=kept), [x], dy)
    assert np.all(np.isneginf(logs[~mask]))
    assert np.all(np.isfinite(logs[mask]))
    assert np.all(np.isfinite(gradient))


@in_each_way
def test_softmax_over_many_classes_is_as_accurate_as_float16_allows(mode):
    x = draw(0, (2, 100000))
    outputs, _ = step(mode, kerasmp.ops.softmax, [x], np.ones((2, 100000)))
    exact = softmax(x)
    held = numpy_of(ops.cast(exact.astype("float32"), "float16"))
    error, best = (np.linalg.norm(y - exact) for y in (outputs, held))
    assert error <= 1.01 * best
