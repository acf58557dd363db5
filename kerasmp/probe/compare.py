"""Compares an array in half precision with the same array in float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# The distance between 1 and the next number, the largest number, and the smallest step.
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}
_SMALLEST_STEP = {"float16": 2.0**-24, "bfloat16": 0.0, "float32": 0.0}
# Sums of a few subnormal numbers are off by a few of their steps.
_STEPS = 8
# Values that are compared at a time, so that copies in float32 stay small.
_CHUNK = 1 << 18


class Comparison(NamedTuple):
    """How a tensor in half precision differs from the same tensor in float32.

    Attributes:
        size: The number of values.
        saturated: Values that are infinite because float32's value is outside the range.
        nonfinite: Other values that are finite in only one of both.
        flushed: Values that are 0, and not 0 in float32.
        nonzero: Values that are finite in both, and not 0 in float32.
        error: The largest relative error of a position: the root mean square of the differences
            along the last axis over that of the values, or over that of the whole tensor if this is
            larger.
        differing: Values that differ, for integers and bools.
        worst: A value in half precision, and in float32, where they differ most.
    """

    size: int = 0
    saturated: int = 0
    nonfinite: int = 0
    flushed: int = 0
    nonzero: int = 0
    error: float = 0.0
    differing: int = 0
    worst: tuple[float, float] = (0.0, 0.0)


def compare(half: Any, wide: Any, dtype: str = "float16") -> Comparison:
    """Compare an array with the same array in float32.

    Args:
        half: A NumPy array, of bools, integers or floats. NumPy has no bfloat16: float32 here.
        wide: An array of the same shape, float32 if `half` has floats.
        dtype: The dtype of `half` in the model.

    Example:

    >>> half, wide = np.array([[300, 0, 2]], "float16"), np.array([[9e4, 1e-9, 2.0]], "float32")
    >>> found = compare(half, wide)
    >>> found.flushed, found.nonzero, round(found.error, 2), found.worst
    (1, 3, 1.0, (300.0, 90000.0))
    """
    if not half.size:
        return Comparison()
    if half.dtype.kind == wide.dtype.kind == "c":
        half, wide = (np.stack([each.real, each.imag], -1) for each in (half, wide))
    if half.dtype.kind not in "fV" or wide.dtype.kind not in "fV":
        return Comparison(half.size, differing=int(np.sum(half != wide)))
    width = half.shape[-1] if half.ndim > 1 else half.size
    rows = half.reshape(-1, width), wide.reshape(-1, width)
    many = max(1, _CHUNK // width)
    parts = [
        _compare_rows(rows[0][i : i + many], rows[1][i : i + many], dtype)
        for i in range(0, len(rows[0]), many)
    ]
    saturated, nonfinite, flushed, nonzero = np.sum([part.counts for part in parts], axis=0)
    squares = np.concatenate([part.squares for part in parts])
    errors = np.concatenate([part.errors for part in parts])
    size = np.maximum(np.maximum(squares, squares.mean()), np.finfo("float64").tiny)
    return Comparison(
        size=half.size,
        saturated=int(saturated),
        nonfinite=int(nonfinite),
        flushed=int(flushed),
        nonzero=int(nonzero),
        error=float(np.sqrt(np.max(errors / size))),
        worst=max(parts, key=lambda part: part.rank).worst,
    )


class _Part(NamedTuple):
    """What some rows contribute to a comparison."""

    counts: tuple[int, int, int, int]
    squares: Any
    errors: Any
    rank: float
    worst: tuple[float, float]


def _compare_rows(half: Any, wide: Any, dtype: str) -> _Part:
    half, wide = half.astype("float32"), wide.astype("float32", copy=False)
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = np.abs(half - wide)
    broken = saturated = np.zeros((), bool)
    if not np.isfinite(difference).all():  # rare
        differ = np.isfinite(half) != np.isfinite(wide)
        outside = np.isinf(half) & (np.abs(wide) > LARGEST[dtype])
        saturated = differ & outside & (np.signbit(half) == np.signbit(wide))
        broken = differ & ~saturated
        finite = np.isfinite(difference)
        difference, wide0 = np.where(finite, difference, 0), np.where(finite, wide, 0)
    else:
        wide0 = wide
    # The worst value is a broken one, or else one outside the range, or else the least accurate.
    ranks = next((each for each in (broken, saturated) if each.any()), difference)
    worst = np.unravel_index(np.argmax(ranks), ranks.shape)
    rank = 2.0 * broken.any() + saturated.any() or difference[worst] / (1 + difference[worst])
    difference = np.maximum(difference - _STEPS * _SMALLEST_STEP[dtype], 0)
    is_nonzero = wide0 != 0
    counts = (saturated.sum(), broken.sum(), (is_nonzero & (half == 0)).sum(), is_nonzero.sum())
    return _Part(
        counts,
        np.einsum("rc,rc->r", wide0, wide0, dtype="float64") / wide.shape[1],
        np.einsum("rc,rc->r", difference, difference, dtype="float64") / wide.shape[1],
        float(rank),
        (float(half[worst]), float(wide[worst])),
    )


class Merge(NamedTuple):
    """How many distinct values rounding leaves.

    Attributes:
        column: The index along the last axis, or None if there is no such axis.
        before: Distinct values before rounding.
        after: Distinct values afterwards.
        example: Two values that become equal.
    """

    column: int | None
    before: int
    after: int
    example: tuple[float, float]


# Rounding matters if it moves a value by more than this part of the spread of the values.
_PART_OF_SPREAD = 1 / 8
# Fewer distinct whole numbers than this part of them: more than a few outliers become equal.
_LEFT = 0.9
# More along the last axis are not columns of a table, but pixels, samples or features.
_MOST_COLUMNS = 1024


def merged(values: Any, half: str) -> Merge | None:
    """Return where rounding data to half precision makes distinct values equal, or None.

    It counts where rounding moves values by more than an eighth of their standard deviation, and in
    a table also where more than a tenth of non-negative whole numbers is lost, such as ids and
    times.

    Args:
        values: An array of numbers. Each column, along the last axis, is looked at by itself.
        half: "float16" or "bfloat16".

    Returns:
        The column that loses the largest part of its values.

    Example:

    >>> merged(np.arange(20190.0, 20250.0)[:, None], "float16")
    Merge(column=0, before=60, after=5, example=(20190.0, 20191.0))
    """
    numbers = np.asarray(values).astype("float32")
    has_columns = numbers.ndim > 1 and numbers.shape[-1] <= _MOST_COLUMNS
    columns = numbers.reshape(-1, numbers.shape[-1] if has_columns else 1)
    rounded = _round(columns, half)
    is_table = numbers.ndim < 3  # noqa: PLR2004 - rows and columns
    found = [
        _merge(columns[:, i], rounded[:, i], int(i) if has_columns else None, is_table=is_table)
        for i in np.flatnonzero(_may_merge(columns, rounded, is_table=is_table))
    ]
    return min(filter(None, found), key=lambda each: each.after / each.before, default=None)


def _may_merge(columns: Any, rounded: Any, *, is_table: bool) -> Any:
    """Return, for each column, whether `_merge` has to sort it, which takes longer than this."""
    is_finite = np.isfinite(rounded)
    with np.errstate(invalid="ignore"):  # inf - inf
        moves = np.max(np.abs(columns - rounded), axis=0, initial=0, where=is_finite)
    least = np.min(columns, axis=0, initial=np.inf, where=is_finite)
    spread = np.max(columns, axis=0, initial=-np.inf, where=is_finite) - least
    # The standard deviation of n values is at least the distance of two of them over sqrt(2 n).
    may_move = moves > 0.99 * _PART_OF_SPREAD * spread / np.sqrt(2 * len(columns))
    may_count = is_table & (least >= 0) & np.all(columns == np.round(columns), 0, where=is_finite)
    return (moves > 0) & (may_move | may_count)


def _merge(column: Any, rounded: Any, index: int | None, *, is_table: bool) -> Merge | None:
    is_finite = np.isfinite(rounded)  # values outside the range are another problem
    distinct, first = np.unique(column[is_finite], return_index=True)
    after = rounded[is_finite][first]  # in the same order, as rounding keeps it
    equal = np.flatnonzero(after[1:] == after[:-1])
    if not equal.size:
        return None
    left = len(distinct) - len(equal)
    moves = np.max(np.abs(distinct - after)) > _PART_OF_SPREAD * np.std(distinct)
    counts = is_table and distinct[0] >= 0 and np.all(distinct == np.round(distinct))
    if not moves and not (counts and left < _LEFT * len(distinct)):
        return None
    example = float(distinct[equal[0]]), float(distinct[equal[0] + 1])
    return Merge(index, len(distinct), left, example)


def _round(numbers: Any, half: str) -> Any:
    """Round float32 numbers to half precision and back."""
    with np.errstate(over="ignore"):
        if half == "float16":
            return numbers.astype("float16").astype("float32")
    # NumPy lacks bfloat16, which is the first half of float32's bits: round to the nearest, ties
    # to even.
    bits = numbers.view("uint32")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(numbers), rounded.view("float32"), numbers)
