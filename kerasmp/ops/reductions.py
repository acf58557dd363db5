"""Sums and other reductions, which in float16 overflow and lose small terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp.docstrings import T, documented
from kerasmp.ops.precision import in_float32, registered

if TYPE_CHECKING:
    from collections.abc import Callable

_FLOAT_X = "the dtype of `x` if it is a float dtype, and otherwise in"


def _reduction(dtype: str, x: str = "dtype", source: str = "") -> Callable[[T], T]:
    """Return a decorator that makes a function a float32 reduction with a full docstring.

    Args:
        dtype: The dtype of the result.
        x: The kind of dtype that `x` may have.
        source: The paper that explains it, if any.
    """
    document = documented(
        args={
            "x": f"A tensor of any shape and {x}.",
            "axis": "The axis or axes to reduce. Defaults to all axes.",
            "keepdims": "Whether to keep the reduced axes with size 1. Defaults to `False`.",
        },
        returns=f"A tensor without the reduced axes, or with size 1 there, in {dtype}.",
        references=source,
    )
    return lambda function: registered(in_float32(document(function)))


@_reduction(
    f"{_FLOAT_X} the dtype of `keras.ops.sum`: int32 for int8 and bool",
    source="[Micikevicius et al., 2018](https://arxiv.org/abs/1710.03740), section 3.3",
)
def sum(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: A001, FBT001, FBT002 - Keras's signature
    """Compute `keras.ops.sum` in float32.

    Example:

    >>> x = keras.ops.ones((4096,), "float16")
    >>> float(sum(x))
    4096.0
    """
    return ops.sum(x, axis=axis, keepdims=keepdims)


@_reduction(f"{_FLOAT_X} float32")
def mean(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Compute `keras.ops.mean` in float32.

    Example:

    >>> x = keras.ops.full((4096,), 100.0, "float16")  # their sum is inf in float16
    >>> float(mean(x))
    100.0
    """
    return ops.mean(x, axis=axis, keepdims=keepdims)


@_reduction(f"{_FLOAT_X} float32; on JAX and torch, float64 also becomes float32")
def var(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Compute `keras.ops.var` in float32.

    Example:

    >>> x = keras.ops.array([-250.0, 250.0, -250.0, 250.0], "float16")
    >>> float(var(x))
    62496.0
    """
    return ops.var(x, axis=axis, keepdims=keepdims)


@_reduction(f"{_FLOAT_X} float32; on JAX and torch, float64 also becomes float32")
def std(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Compute `keras.ops.std` in float32.

    Where all values are equal, the gradient is 0 instead of NaN.

    Example:

    >>> x = keras.ops.array([-1000.0, 1000.0], "float16")  # the variance is inf in float16
    >>> float(std(x))
    1000.0
    """
    variance = ops.var(x, axis=axis, keepdims=keepdims)
    # The derivative of sqrt at 0 is inf, so sqrt must not see a 0, not even where it is discarded.
    positive = ops.greater(variance, 0)
    return ops.where(positive, ops.sqrt(ops.where(positive, variance, 1)), 0)


@registered
@in_float32
def cumsum(x: Any, axis: int | None = None) -> Any:
    """Compute `keras.ops.cumsum` in float32.

    Args:
        x: A tensor of any shape and dtype.
        axis: The axis to sum along. Defaults to `None`, which flattens `x` first.

    Returns:
        A tensor of the shape of `x`, or of rank 1 if `axis` is `None`, in the dtype of `x`, except
        int32 for bool, and float32 for float64 on torch.

    Example:

    >>> x = keras.ops.ones((4096,), "float16")
    >>> float(cumsum(x)[-1])
    4096.0
    """
    return ops.cumsum(x, axis=axis)


@_reduction(
    "the dtype of `x`",
    "float dtype",
    source="[Blanchard et al., 2021](https://arxiv.org/abs/1909.03469)",
)
def logsumexp(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Compute `keras.ops.logsumexp` in float32.

    Example:

    >>> x = keras.ops.zeros((100000,), "float16")
    >>> round(float(logsumexp(x)), 1)
    11.5
    """
    return ops.logsumexp(x, axis=axis, keepdims=keepdims)


@registered
@in_float32
def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: A002, FBT001, FBT002 - Keras's signature
    """Compute `keras.ops.norm` in float32.

    The gradient for a zero vector is 0 instead of NaN.

    Args:
        x: A tensor of any shape and float dtype.
        ord: The order of the norm, as in `keras.ops.norm`.
        axis: The axis of vectors, or the two axes of matrices. Defaults to all axes, of which there
            may be more than two only on JAX and torch, and only without `ord`.
        keepdims: Whether to keep the reduced axes with size 1. Defaults to `False`.

    Returns:
        A tensor without the reduced axes, or with size 1 there, in the dtype of `x`; on JAX and
        torch, float64 becomes float32.

    Example:

    >>> x = keras.ops.array([300.0, 400.0], "float16")  # their squares are inf in float16
    >>> float(norm(x))
    500.0
    """
    zero = ops.equal(x, 0)
    nonzero = ops.where(ops.all(zero, axis=axis, keepdims=True), 1, x)
    length = ops.norm(nonzero, ord=ord, axis=axis, keepdims=keepdims)
    return ops.where(ops.all(zero, axis=axis, keepdims=keepdims), 0, length)


@registered
@in_float32
def normalize(x: Any, axis: Any = -1, order: int = 2, epsilon: float | None = None) -> Any:
    """Compute `keras.ops.normalize` in float32.

    A zero vector stays zero, and its gradient is 0 instead of NaN.

    Args:
        x: A tensor of any shape and float dtype.
        axis: The axis or axes to normalize. Defaults to the last axis.
        order: The order of the norm, an integer of at least 1. Defaults to 2.
        epsilon: The lower bound of the norm to divide by. Defaults to `keras.config.epsilon()`.

    Returns:
        A tensor of the same shape and dtype as `x`.

    Raises:
        ValueError: If `order` is not an integer of at least 1.

    Example:

    >>> x = keras.ops.array([[300.0, 400.0], [0.0, 0.0]], "float16")
    >>> keras.ops.convert_to_numpy(normalize(x)).round(3).tolist()
    [[0.60009765625, 0.7998046875], [0.0, 0.0]]
    """
    # Keras divides by a clipped norm whose derivative at 0 is inf, so it must not see a zero.
    zero = ops.all(ops.equal(x, 0), axis=axis, keepdims=True)
    nonzero = ops.where(zero, 1, x)
    return ops.where(zero, 0, ops.normalize(nonzero, axis=axis, order=order, epsilon=epsilon))


@registered
@in_float32
def average_pool(
    inputs: Any,
    pool_size: Any,
    strides: Any = None,
    padding: str = "valid",
    data_format: str | None = None,
) -> Any:
    """Compute `keras.ops.average_pool` in float32.

    Args:
        inputs: A tensor of any float dtype and shape `(batch, ..., channels)` with one, two or
            three spatial axes, or `(batch, channels, ...)` if `data_format` is "channels_first".
        pool_size: The size of the window, an integer or one for each spatial axis.
        strides: The strides of the window. Defaults to `pool_size`.
        padding: "valid" or "same". Defaults to "valid".
        data_format: "channels_last" or "channels_first". Defaults to the value in the Keras config.

    Returns:
        A tensor with one value per window and channel, in the dtype of `inputs`.

    Example:

    >>> x = keras.ops.full((1, 112, 112, 1), 10.0, "float16")  # their sum is inf in float16
    >>> float(average_pool(x, 112)[0, 0, 0, 0])
    10.0
    """
    strides = pool_size if strides is None else strides  # None fails in Keras 3.15 on JAX
    return ops.average_pool(
        inputs, pool_size, strides=strides, padding=padding, data_format=data_format
    )
