"""Counts the multiply-adds in a call of a matrix product, a convolution and the like.

Each counting function takes the values of the call's arguments, the keyword arguments, and the
result. Multiplications by padding count, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from collections.abc import Callable

    Count = Callable[[list[Any], dict[str, Any], Any], int]


def factors(values: list[Any]) -> list[Any]:
    """Return the tensors and variables among the arguments of a call, including those in lists."""
    return [x for x in keras.tree.flatten(values) if hasattr(x, "shape") and hasattr(x, "dtype")]


def size(tensor: Any) -> int:
    """Return the number of elements of a tensor."""
    return math.prod(map(int, tensor.shape))


def _last_axis(values: list[Any], _: dict[str, Any], out: Any) -> int:
    return size(out) * int(factors(values)[0].shape[-1])


def _whole_size(values: list[Any], _: dict[str, Any], __: Any) -> int:
    return size(factors(values)[0])


def _tensordot(values: list[Any], _: dict[str, Any], out: Any) -> int:
    one, other = factors(values)[:2]
    # A contracted axis is in both factors and not in the result, any other in one and the result.
    return math.isqrt(size(one) * size(other) * size(out))


def _einsum(values: list[Any], _: dict[str, Any], __: Any) -> int:
    subscripts = next(x for x in values if isinstance(x, str)).replace(" ", "").split("->")[0]
    operands = factors(values)
    sizes: dict[str, int] = {}
    for letters, operand in zip(subscripts.split(","), operands, strict=True):
        for letter, length in _axis_lengths(letters, list(map(int, operand.shape))):
            sizes[letter] = max(sizes.get(letter, 1), length)
    return math.prod(sizes.values()) * (len(operands) - 1)


def _axis_lengths(letters: str, shape: list[int]) -> list[tuple[str, int]]:
    front, _, back = letters.partition("...")
    middle = shape[len(front) : len(shape) - len(back)]
    # The axes of an ellipsis are aligned at the end, and broadcast.
    dots = [(f"...{number}", length) for number, length in enumerate(reversed(middle))]
    ends = [*shape[: len(front)], *shape[len(shape) - len(back) :]]
    return [*zip(front + back, ends, strict=True), *dots]


def _conv(values: list[Any], _: dict[str, Any], out: Any) -> int:
    kernel = factors(values)[1]
    return size(out) * size(kernel) // int(kernel.shape[-1])


def _depthwise(values: list[Any], _: dict[str, Any], out: Any) -> int:
    return size(out) * math.prod(map(int, factors(values)[1].shape[:-2]))


def _separable(values: list[Any], _: dict[str, Any], out: Any) -> int:
    _inputs, depthwise, pointwise = factors(values)[:3]
    between, channels = map(int, pointwise.shape[-2:])
    window = math.prod(map(int, depthwise.shape[:-2]))
    return size(out) // channels * between * (window + channels)


def _transposed(values: list[Any], _: dict[str, Any], __: Any) -> int:
    inputs, kernel = factors(values)[:2]
    return size(inputs) * size(kernel) // int(kernel.shape[-1])


def _attention(values: list[Any], _: dict[str, Any], __: Any) -> int:
    query, key, value = factors(values)[:3]
    scores = size(query) // int(query.shape[-1]) * int(key.shape[1])
    return scores * (int(query.shape[-1]) + int(value.shape[-1]))


def _recurrent(values: list[Any], keywords: dict[str, Any], _: Any) -> int:
    inputs = factors(values)[0]
    steps = size(inputs) // int(inputs.shape[-1])
    return steps * (size(keywords["kernel"]) + size(keywords["recurrent_kernel"]))


COUNTS: dict[str, Count] = {
    "matmul": _last_axis,
    "dot": _last_axis,
    "inner": _last_axis,
    "vdot": _whole_size,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "conv": _conv,
    "depthwise_conv": _depthwise,
    "separable_conv": _separable,
    "conv_transpose": _transposed,
    "dot_product_attention": _attention,
    "lstm": _recurrent,
    "gru": _recurrent,
}
