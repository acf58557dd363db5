"""Activations of float16 tensors, forward and backward, against NumPy in float64."""

import math

import keras
import numpy as np
import pytest
from helpers.float16 import assert_near_best, draw, numpy_of, rounded, step
from helpers.marks import few, full, full_on, in_each_way
from helpers.references import sigmoid
from keras import ops

import kerasmp


def normal(x):
    """Return the normal cumulative distribution function, accurate in both tails."""
    return np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2)) / 2


def _gelu_slope(x):
    return normal(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tanh_gelu(x):
    return x * sigmoid(2 * _tanh_gelu_inner(x))


def _tanh_gelu_inner(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _tanh_gelu_slope(x):
    p = sigmoid(2 * _tanh_gelu_inner(x))
    rest = sigmoid(-2 * _tanh_gelu_inner(x))
    return p + 2 * x * p * rest * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def _softplus(x):
    return np.logaddexp(0, x)


def _mish_slope(x):
    t = np.tanh(_softplus(x))
    return t + x * sigmoid(x) * (1 - t) * (1 + t)


def _elu(x, alpha=1.0):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _elu_slope(x, alpha=1.0):
    return np.where(x > 0, 1, alpha * np.exp(np.minimum(x, 0)))


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

# Name in kerasmp.ops: the exact function and its derivative, in float64.
ACTIVATIONS = {
    "celu": (_elu, _elu_slope),
    "elu": (_elu, _elu_slope),
    "exponential": (np.exp, np.exp),
    "gelu": (lambda x: x * normal(x), _gelu_slope),
    "hard_silu": (
        lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        lambda x: np.where(np.abs(x) < 3, x / 3 + 0.5, x > 0),
    ),
    "log_sigmoid": (lambda x: -_softplus(-x), lambda x: sigmoid(-x)),
    "mish": (lambda x: x * np.tanh(_softplus(x)), _mish_slope),
    "selu": (
        lambda x: _SELU_SCALE * _elu(x, _SELU_ALPHA),
        lambda x: _SELU_SCALE * _elu_slope(x, _SELU_ALPHA),
    ),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "silu": (
        lambda x: x * sigmoid(x),
        lambda x: sigmoid(x) * (1 + x * sigmoid(-x)),
    ),
    "softplus": (_softplus, sigmoid),
    "softsign": (lambda x: x / (1 + np.abs(x)), lambda x: 1 / (1 + np.abs(x)) ** 2),
    "sparse_plus": (
        lambda x: np.where(x <= -1, 0, np.where(x < 1, (x + 1) ** 2 / 4, x)),
        lambda x: np.where(x <= -1, 0, np.where(x < 1, (x + 1) / 2, 1)),
    ),
    "sparse_sigmoid": (lambda x: np.clip((x + 1) / 2, 0, 1), lambda x: (np.abs(x) < 1) / 2),
    "squareplus": (
        lambda x: (x + np.sqrt(x * x + 4)) / 2,
        lambda x: (1 + x / np.sqrt(x * x + 4)) / 2,
    ),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(np.clip(x, -300, 300)) ** 2),
    "tanh_shrink": (lambda x: x - np.tanh(x), lambda x: np.tanh(x) ** 2),
}
TANH_GELU = (_tanh_gelu, _tanh_gelu_slope)

# Scale of the inputs, and of the upstream gradients.
MAGNITUDES = [(0.02, 1.0), (1.0, 1.0), (10.0, 1000.0), (1000.0, 1.0), (15000.0, 200.0)]


def approximate_gelu(x):
    return kerasmp.ops.gelu(x, approximate=True)


CASES = {name: (getattr(kerasmp.ops, name), *case) for name, case in ACTIVATIONS.items()}
CASES["tanh gelu"] = (approximate_gelu, *TANH_GELU)


def drawn(seed, scale, upstream):
    x = draw(seed, (2000,), scale)
    kinks = np.isin(np.abs(x), [0, 1, 3])  # where some are not differentiable
    return np.where(kinks, 1.125 * scale, x), draw(seed + 1, (2000,), upstream)


def near_best(mode, function, value, slope):
    for seed, (scale, upstream) in enumerate(MAGNITUDES):
        x, dy = drawn(seed, scale, upstream)
        outputs, (gradient,) = step(mode, function, [x], dy)
        with np.errstate(over="ignore"):
            assert_near_best(outputs, value(x))
            assert_near_best(gradient, slope(x) * dy)


# On JAX each is compiled: only those that are more than one call of Keras's function.
MECHANISMS = {"gelu", "hard_silu", "mish", "silu", "squareplus", "tanh gelu"}
JAX = keras.backend.backend() == "jax"


@in_each_way
@pytest.mark.parametrize("name", few(CASES, MECHANISMS, where=JAX))
def test_values_and_gradients_are_within_four_times_the_best(name, mode):
    near_best(mode, *CASES[name])


def test_every_activation_is_tested():
    public = {name for name in kerasmp.ops.__all__ if hasattr(keras.activations, name)}
    elsewhere = {"glu", "softmax", "log_softmax"}  # below, and in test_reductions.py
    assert public - elsewhere == set(ACTIVATIONS) | {"swish", "hard_swish"}


@in_each_way
@pytest.mark.parametrize(("name", "low", "high"), [("sigmoid", 4, 9), ("tanh", 2, 5)])
def test_gradients_in_the_tails_do_not_come_from_rounded_outputs(name, low, high, mode):
    """If the output is at least 1 - 2**-11, one float16 step is the whole gradient.

    test_hazards.py measures the layer, which calls Keras's functions.
    """
    value, slope = ACTIVATIONS[name]
    x = rounded(np.random.default_rng(0).uniform(low, high, 2000))
    dy = draw(1, (2000,))
    outputs, (gradient,) = step(mode, getattr(kerasmp.ops, name), [x], dy)
    assert_near_best(outputs, value(x))
    assert_near_best(gradient, slope(x) * dy)


@full_on("jax")
@in_each_way
def test_glu_is_one_half_times_the_sigmoid_of_the_other(mode):
    a, b, dy = (draw(seed, (100, 20), scale) for seed, scale in enumerate([1000.0, 3.0, 50.0]))
    outputs, (gradient,) = step(mode, kerasmp.ops.glu, [np.concatenate([a, b], -1)], dy)
    gate, slope = (part(b) for part in ACTIVATIONS["sigmoid"])
    assert_near_best(outputs, a * gate)
    assert_near_best(gradient, np.concatenate([dy * gate, dy * a * slope], -1))


@full_on("jax")
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"tanh gelu", "mish"}))
@pytest.mark.parametrize("dtype", [full("bfloat16"), "float32"])
def test_values_equal_those_of_keras_computed_in_float32(name, dtype):
    x = ops.cast(np.linspace(-4, 4, 33, dtype="float32"), dtype)
    ours = CASES[name][0](x)
    stock = getattr(keras.activations, name)(ops.cast(x, "float32"))
    assert keras.backend.standardize_dtype(ours.dtype) == dtype
    np.testing.assert_array_equal(numpy_of(ours), numpy_of(ops.cast(stock, dtype)))


@full_on("jax")
def test_arguments_reach_keras():
    x = ops.convert_to_tensor([-2.0, 3.0])
    for ours, stock in [
        (kerasmp.ops.elu(x, 2.0), keras.activations.elu(x, 2.0)),
        (kerasmp.ops.celu(x, alpha=2.0), keras.activations.celu(x, alpha=2.0)),
        (kerasmp.ops.squareplus(x, b=1), keras.activations.squareplus(x, b=1)),
        (kerasmp.ops.glu(x, axis=0), keras.activations.glu(x, axis=0)),
    ]:
        np.testing.assert_array_equal(numpy_of(ours), numpy_of(stock))


def test_layers_with_an_activation_are_saved_and_loaded(tmp_path):
    names = [*ACTIVATIONS, "swish", "hard_swish", "softmax", "log_softmax"]
    dense = [
        keras.layers.Dense(3, activation=getattr(kerasmp.ops, name), dtype="mixed_float16")
        for name in names
    ]
    model = keras.Sequential([keras.Input((3,)), *dense])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for layer, name in zip(loaded.layers, names, strict=True):
        assert layer.activation is getattr(kerasmp.ops, name), name
        assert layer.dtype_policy.name == "mixed_float16"
