"""Helpers on dtypes and lists of tensors that all backends share."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
from keras import ops

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# A tensor of the framework. A gradient may also be a sparse tensor, or None.
Tensor = Any


class Weight(NamedTuple):
    """What a fused update needs for one variable, all of it dense and float32.

    Attributes:
        variable: The `keras.Variable`.
        gradient: A tensor; the update does not change it.
        moments: The optimizer's moments of the variable.
        decay: The fraction by which the variable shrinks before the update, a scalar; or None.
    """

    variable: Any
    gradient: Tensor
    moments: tuple[Any, ...]
    decay: Tensor | None


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Return Keras's name for a dtype. Cached, because Keras compares strings on each call."""
    return str(keras.backend.standardize_dtype(dtype))


def accumulation_dtype(values: Tensor) -> str:
    """Return the dtype to accumulate in: float64 for float64 tensors, float32 for all others."""
    return "float64" if dtype_name(values.dtype) == "float64" else "float32"


def chunks(items: Sequence[Any], sizes: Sequence[int], limit: int) -> Iterator[list[Any]]:
    """Split items into lists whose total size is at most `limit`, or that hold one larger item."""
    chunk: list[Any] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        total += size
        if chunk and total > limit:
            yield chunk
            chunk, total = [], size
        chunk.append(item)
    if chunk:
        yield chunk


def finite_norms(squares: Sequence[Tensor], norm: str) -> Tensor:
    """Return a bool vector: for each tensor, whether it keeps the norm finite.

    Args:
        squares: The sum of squares of each tensor, a scalar.
        norm: "each" if every tensor has its own norm, "all" if they share one.
    """
    dtype = "float64" if "float64" in map(accumulation_dtype, squares) else "float32"
    sums = ops.stack([ops.cast(s, dtype) for s in squares])
    if norm == "each":
        return ops.isfinite(sums)
    # If the total overflows, at least one sum exceeds its equal share of the limit.
    return ops.logical_or(ops.isfinite(sums * len(squares)), ops.isfinite(ops.sum(sums)))
