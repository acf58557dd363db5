"""Sums and what is made of them: in float16 they overflow, and lose small terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp.docstrings import T, documented
from kerasmp.ops.precision import in_float32, registered

if TYPE_CHECKING:
    from collections.abc import Callable

_OF_X = "the dtype of `x` if that is a float, else in"


def _reduction(dtype: str, x: str = "dtype", source: str = "") -> Callable[[T], T]:
    """Return a decorator that makes a reduction of a function, and completes its docstring.

    Args:
        dtype: That of the result.
        x: What may be any of `x`, besides its shape.
        source: Where it comes from, if that is known.
    """
    document = documented(
        args={
            "x": f"A tensor of any shape and {x}.",
            "axis": "Axis or axes to reduce; default all.",
            "keepdims": "Whether the axes stay, with length 1.",
        },
        returns=f"A tensor without those axes, or with length 1 there if `keepdims`, in {dtype}.",
        references=source,
    )
    return lambda function: registered(in_float32(document(function)))


@_reduction(
    f"{_OF_X} that of `keras.ops.sum`: int8 and bool give int32",
    source="[Micikevicius et al., 2018](https://arxiv.org/abs/1710.03740), section 3.3",
)
def sum(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: A001, FBT001, FBT002 - as in keras.ops
    """Return `keras.ops.sum`, summed in float32.

    Example:

    >>> x = keras.ops.ones((4096,), "float16")
    >>> float(sum(x))
    4096.0
    """
    return ops.sum(x, axis=axis, keepdims=keepdims)


@_reduction(f"{_OF_X} float32")
def mean(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Return `keras.ops.mean`, summed in float32.

    Example:

    >>> x = keras.ops.full((4096,), 100.0, "float16")  # their sum is inf in float16
    >>> float(mean(x))
    100.0
    """
    return ops.mean(x, axis=axis, keepdims=keepdims)


@_reduction(f"{_OF_X} float32; on JAX and torch, in float32 for float64 too")
def var(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Return `keras.ops.var`, computed in float32.

    Example:

    >>> x = keras.ops.array([-250.0, 250.0, -250.0, 250.0], "float16")
    >>> float(var(x))
    62496.0
    """
    return ops.var(x, axis=axis, keepdims=keepdims)


@_reduction(f"{_OF_X} float32; on JAX and torch, in float32 for float64 too")
def std(x: Any, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Return `keras.ops.std`, computed in float32.

    Where all values are equal the gradient is 0, and not NaN.

    Example:

    >>> x = keras.ops.array([-1000.0, 1000.0], "float16")  # the variance is inf in float16
    >>> float(std(x))
    1000.0
    """
    variance = ops.var(x, axis=axis, keepdims=keepdims)
    # The derivative of sqrt at 0 is inf: keep 0 from it, on the way forward and on the way back.
    positive = ops.greater(variance, 0)
    return ops.where(positive, ops.sqrt(ops.where(positive, variance, 1)), 0)


@registered
@in_float32
def cumsum(x: Any, axis: int | None = None) -> Any:
    """Return `keras.ops.cumsum`, summed in float32.

    Args:
        x: A tensor of any shape and dtype.
        axis: Axis to sum along; default None, which flattens first.

    Returns:
        A tensor of the shape of `x`, or of one axis if `axis` is None, in the dtype of `x`, but of
        bool in int32, and of float64 on torch in float32.

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
    """Return `keras.ops.logsumexp`, computed in float32.

    Example:

    >>> x = keras.ops.zeros((100000,), "float16")
    >>> round(float(logsumexp(x)), 1)
    11.5
    """
    return ops.logsumexp(x, axis=axis, keepdims=keepdims)


@registered
@in_float32
def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: A002, FBT001, FBT002 - as in keras.ops
    """Return `keras.ops.norm`, computed in float32.

    The gradient of a zero vector is 0, and not NaN.

    Args:
        x: A tensor of any shape and float dtype.
        ord: The order, as for `keras.ops.norm`.
        axis: Axis, or two axes of a matrix; default all, which may be more than two only on JAX and
            torch, and without `ord`.
        keepdims: Whether the axes stay, with length 1.

    Returns:
        A tensor without those axes, or with length 1 there if `keepdims`, in the dtype of `x`; on
        JAX and torch, in float32 for float64.

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
    """Return `keras.ops.normalize`, computed in float32.

    A zero vector stays zero, and its gradient is 0, not NaN.

    Args:
        x: A tensor of any shape and float dtype; the result has both.
        axis: Axis or axes along which the length is 1; default the last.
        order: The order of the norm, an int of at least 1; default 2.
        epsilon: The least length by which is divided; default `keras.config.epsilon()`.

    Raises:
        ValueError: If `order` is no int of at least 1.

    Example:

    >>> x = keras.ops.array([[300.0, 400.0], [0.0, 0.0]], "float16")
    >>> keras.ops.convert_to_numpy(normalize(x)).round(3).tolist()
    [[0.60009765625, 0.7998046875], [0.0, 0.0]]
    """
    # Keras divides by a clipped length whose derivative at 0 is inf: let no zero get there.
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
    """Return `keras.ops.average_pool`, summed in float32.

    Args:
        inputs: A tensor of shape `(batch, ..., channels)`, or as `data_format` says, of any float
            dtype; one, two or three axes lie between.
        pool_size: The size of the window, an int or one for each dimension.
        strides: The steps of the window; default `pool_size`.
        padding: "valid" (default) or "same".
        data_format: "channels_last" or "channels_first"; default that of the Keras config.

    Returns:
        A tensor with as many positions along each axis as windows fit there, in the dtype of
        `inputs`.

    Example:

    >>> x = keras.ops.full((1, 112, 112, 1), 10.0, "float16")  # their sum is inf in float16
    >>> float(average_pool(x, 112)[0, 0, 0, 0])
    10.0
    """
    strides = pool_size if strides is None else strides  # None fails in Keras 3.15 on JAX
    return ops.average_pool(
        inputs, pool_size, strides=strides, padding=padding, data_format=data_format
    )
