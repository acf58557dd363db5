"""NumPy in float64: what activations, reductions and losses are, and their gradients."""

import math

import numpy as np


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def normal(x):
    """Return the normal distribution function, accurate in both tails."""
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

# Name in kerasmp.ops: the function and its derivative.
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


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def softmax_gradient(x, dy, axis=-1):
    p = softmax(x, axis)
    # Shifted by one of them, which changes nothing but the rounding.
    dy = dy - dy.max(axis, keepdims=True)
    return p * (dy - (p * dy).sum(axis, keepdims=True))


def log_softmax(x, axis=-1):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def log_softmax_gradient(x, dy, axis=-1):
    return dy - softmax(x, axis) * dy.sum(axis, keepdims=True)


def _length(x):
    return np.sqrt((x * x).sum(-1, keepdims=True))


def normalize(x):
    return x / np.where(_length(x) == 0, 1, _length(x))


def normalize_gradient(x, dy):
    y, length = normalize(x), _length(x)
    return np.where(
        length == 0,
        0,
        (dy - y * (y * dy).sum(-1, keepdims=True)) / np.where(length == 0, 1, length),
    )


def _cumsum_gradient(x, dy):  # noqa: ARG001 - all gradients take both
    return dy[..., ::-1].cumsum(-1)[..., ::-1]


def _std_gradient(x, dy):
    distance, std = x - x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    return dy[..., None] * distance / x.shape[-1] / np.where(std == 0, 1, std)


# Name in kerasmp.ops, over the last axis: the function, and the gradient for an upstream one.
REDUCTIONS = {
    "cumsum": (lambda x: x.cumsum(-1), _cumsum_gradient),
    "log_softmax": (log_softmax, log_softmax_gradient),
    "logsumexp": (
        lambda x: x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)),
        lambda x, dy: dy[..., None] * softmax(x),
    ),
    "mean": (lambda x: x.mean(-1), lambda x, dy: dy[..., None] / x.shape[-1] + 0 * x),
    "norm": (lambda x: _length(x)[..., 0], lambda x, dy: dy[..., None] * normalize(x)),
    "normalize": (normalize, normalize_gradient),
    "softmax": (softmax, softmax_gradient),
    "std": (lambda x: x.std(-1), _std_gradient),
    "sum": (lambda x: x.sum(-1), lambda x, dy: dy[..., None] + 0 * x),
    "var": (
        lambda x: x.var(-1),
        lambda x, dy: dy[..., None] * 2 * (x - x.mean(-1, keepdims=True)) / x.shape[-1],
    ),
}
