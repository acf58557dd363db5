"""Activations whose values and gradients are right in float16.

Each is that of `keras.activations`, with the same arguments and defaults, computed in float32; its
argument `x` is a tensor of any float dtype, and so is the result. Stock activations in float16
overflow on the way back (the product of a large gradient with `x` is inf, times 0 is NaN), or
compute their gradient from an output that was rounded to float16. They are registered with Keras:
a model with `Dense(8, activation=kerasmp.ops.gelu)` is saved and loaded like any other.

The rest of `keras.activations`, the relu family and the piecewise linear ones, is right as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from keras import ops

from kerasmp.ops.precision import in_float32, registered

F = TypeVar("F", bound=Callable[..., Any])


def _activation(function: F) -> F:
    return registered(in_float32(function))  # type: ignore[no-any-return] # Keras has no types


@_activation
def sigmoid(x: Any) -> Any:
    """Return `1 / (1 + exp(-x))`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(sigmoid(keras.ops.array(0.0, "float16")))
    0.5
    """
    return ops.sigmoid(x)


@_activation
def log_sigmoid(x: Any) -> Any:
    """Return `log(sigmoid(x))`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(log_sigmoid(keras.ops.array(-1000.0, "float16")))
    -1000.0
    """
    return ops.log_sigmoid(x)


@_activation
def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(tanh(keras.ops.array(0.0, "float16")))
    0.0
    """
    return ops.tanh(x)


@_activation
def tanh_shrink(x: Any) -> Any:
    """Return `x - tanh(x)`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(tanh_shrink(keras.ops.array(9.0, "float16")))
    8.0
    """
    return ops.tanh_shrink(x)


@_activation
def gelu(x: Any, approximate: bool = False) -> Any:  # noqa: FBT001, FBT002 - as in Keras
    """Return `x` times the normal distribution function of `x`.

    As in `keras.activations`, and not as in `keras.ops`, the default is the exact form.

    Args:
        x: A tensor of any shape and float dtype; the result has both.
        approximate: Whether to use the approximation by tanh; default False.

    References:
        Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, https://arxiv.org/abs/1606.08415.

    Example:

    >>> float(gelu(keras.ops.array(100.0, "float16")))
    100.0
    """
    return ops.gelu(x, approximate=approximate)


@_activation
def silu(x: Any) -> Any:
    """Return `x * sigmoid(x)`, which is also called swish.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Ramachandran et al., Searching for Activation Functions, 2017,
        https://arxiv.org/abs/1710.05941.

    Example:

    >>> float(silu(keras.ops.array(100.0, "float16")))
    100.0
    """
    return ops.silu(x)


@_activation
def hard_silu(x: Any) -> Any:
    """Return `x * hard_sigmoid(x)`, which is also called hard swish.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Howard et al., Searching for MobileNetV3, 2019, https://arxiv.org/abs/1905.02244.

    Example:

    >>> float(hard_silu(keras.ops.array(3.0, "float16")))
    3.0
    """
    return ops.hard_silu(x)


@_activation
def mish(x: Any) -> Any:
    """Return `x * tanh(softplus(x))`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Misra, Mish: A Self Regularized Non-Monotonic Activation Function, 2019,
        https://arxiv.org/abs/1908.08681.

    Example:

    >>> float(mish(keras.ops.array(100.0, "float16")))
    100.0
    """
    return x * ops.tanh(ops.softplus(x))


@_activation
def glu(x: Any, axis: int = -1) -> Any:
    """Return one half of `x` times the sigmoid of the other.

    Args:
        x: A tensor of any shape and float dtype, of even length along `axis`.
        axis: The axis to halve; default the last.

    Returns:
        A tensor of half that length there, in the dtype of `x`.

    References:
        Dauphin et al., Language Modeling with Gated Convolutional Networks, 2016,
        https://arxiv.org/abs/1612.08083.

    Example:

    >>> float(glu(keras.ops.array([3.0, 0.0], "float16"))[0])
    1.5
    """
    return ops.glu(x, axis=axis)


@_activation
def softplus(x: Any) -> Any:
    """Return `log(exp(x) + 1)`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(softplus(keras.ops.array(100.0, "float16")))
    100.0
    """
    return ops.softplus(x)


@_activation
def softsign(x: Any) -> Any:
    """Return `x / (abs(x) + 1)`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(softsign(keras.ops.array(3.0, "float16")))
    0.75
    """
    return ops.softsign(x)


@_activation
def squareplus(x: Any, b: float = 4) -> Any:
    """Return `(x + sqrt(x**2 + b)) / 2`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.
        b: The smoothness; default 4.

    References:
        Barron, Squareplus: A Softplus-Like Algebraic Rectifier, 2021,
        https://arxiv.org/abs/2112.11687.

    Example:

    >>> float(squareplus(keras.ops.array(1000.0, "float16")))
    1000.0
    """
    return ops.squareplus(x, b=b)


@_activation
def sparse_plus(x: Any) -> Any:
    """Return 0 up to -1, `(x + 1)**2 / 4` up to 1, and `x` from there.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(sparse_plus(keras.ops.array(0.0, "float16")))
    0.25
    """
    return ops.sparse_plus(x)


@_activation
def sparse_sigmoid(x: Any) -> Any:
    """Return 0 up to -1, `(x + 1) / 2` up to 1, and 1 from there.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(sparse_sigmoid(keras.ops.array(0.0, "float16")))
    0.5
    """
    return ops.sparse_sigmoid(x)


@_activation
def elu(x: Any, alpha: float = 1.0) -> Any:
    """Return `x` where it is positive, `alpha * (exp(x) - 1)` elsewhere.

    Args:
        x: A tensor of any shape and float dtype; the result has both.
        alpha: The slope at 0 from below; default 1.

    References:
        Clevert et al., Fast and Accurate Deep Network Learning by Exponential Linear Units,
        2015, https://arxiv.org/abs/1511.07289.

    Example:

    >>> float(elu(keras.ops.array(-100.0, "float16")))
    -1.0
    """
    return ops.elu(x, alpha=alpha)


@_activation
def celu(x: Any, alpha: float = 1.0) -> Any:
    """Return `x` where it is positive, `alpha * (exp(x / alpha) - 1)` elsewhere.

    Args:
        x: A tensor of any shape and float dtype; the result has both.
        alpha: Minus the least value; default 1.

    References:
        Barron, Continuously Differentiable Exponential Linear Units, 2017,
        https://arxiv.org/abs/1704.07483.

    Example:

    >>> float(celu(keras.ops.array(-100.0, "float16")))
    -1.0
    """
    return ops.celu(x, alpha=alpha)


@_activation
def selu(x: Any) -> Any:
    """Return `1.0507 * elu(x, 1.6733)`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Klambauer et al., Self-Normalizing Neural Networks, 2017,
        https://arxiv.org/abs/1706.02515.

    Example:

    >>> round(float(selu(keras.ops.array(-100.0, "float16"))), 2)
    -1.76
    """
    return ops.selu(x)


@_activation
def exponential(x: Any) -> Any:
    """Return `exp(x)`.

    Args:
        x: A tensor of any shape and float dtype; the result has both.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> float(exponential(keras.ops.array(0.0, "float16")))
    1.0
    """
    return ops.exp(x)


# Keras knows these under both names.
swish = silu
hard_swish = hard_silu
