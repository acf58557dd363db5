"""Statistics of a step's gradients, for schedules that ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# The smallest positive number in float16. A value below half of it is rounded to zero.
SMALLEST = 2.0**-24


def gradient_max(scaled: Sequence[Any], scale: Any) -> Any:
    """Return the largest absolute value among the unscaled gradients, as a float32 scalar.

    Args:
        scaled: Gradients of the scaled loss, as dense tensors.
        scale: The scale.
    """
    largest = [ops.max(ops.abs(ops.cast(g, "float32"))) for g in scaled]
    return ops.max(ops.stack(largest)) / scale


def underflow(scaled: Sequence[Any], scale: Any) -> Any:  # noqa: ARG001 - one signature for all
    """Return the estimated share of gradient values that float16 flushed to zero, from 0 to 1.

    A zero does not show what it was. But small numbers become rarer the smaller they are, and the
    rate at which they do just above the limit shows how many lay below it. The numbers that round
    to 1 or 2 times the smallest one, `a` of them, and those that round to 3 to 12 times it, `b` of
    them, come from ranges of the same ratio (0.5 to 2.5, and 2.5 to 12.5). With r = a / b, the
    ranges below hold about a * (r + r**2 + ...) numbers, and never more than there are zeros. If
    every value is zero, nothing is left to estimate from, and all of them count as flushed.

    Args:
        scaled: Gradients of the scaled loss, as dense tensors.
        scale: Not used, because float16 flushes values of the scaled gradients.
    """
    sizes = [ops.abs(ops.cast(g, "float32")) / SMALLEST for g in scaled]

    def count_between(low: float, high: float) -> Any:
        inside = [ops.logical_and(g > low, g < high) for g in sizes]
        return sum(ops.sum(ops.cast(hit, "float32")) for hit in inside)

    total = sum(ops.cast(ops.size(g), "float32") for g in sizes)
    zeros = sum(ops.sum(ops.cast(g == 0, "float32")) for g in sizes)
    a, b = count_between(0.0, 2.5), count_between(2.5, 12.5)
    below = ops.where(a < b, a * a / ops.maximum(b - a, 1.0), ops.where(a > 0, zeros, 0.0))
    return ops.where(zeros == total, 1.0, ops.minimum(below, zeros) / total)


STATISTICS: dict[str, Callable[[Sequence[Any], Any], Any]] = {
    "gradient_max": gradient_max,
    "underflow": underflow,
}
