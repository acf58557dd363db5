"""Counts the magnitudes of an array by their exponents."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

# The bits of a float32: a sign, 8 of the exponent, 23 of the fraction.
_MAGNITUDE, _FRACTION, _INF, _BIAS = 0x7FFFFFFF, 23, 0x7F800000, 127
_EXPONENTS = 256
_CHUNK = 1 << 20
# Numbers of this exponent and below become 0 in float16, whose smallest number is 2**-24. (Those
# between 2**-25 and 2**-24 are rounded up.)
_VANISHING = -26
# Half of the largest number is the power of two with this exponent, but for its last bits.
_HIGH = {"float16": 15, "bfloat16": 127, "float32": 127}


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """The magnitudes of numbers.

    Attributes:
        size: How many numbers there are.
        zeros: How many are 0.
        nonfinite: How many are inf or NaN.
        largest: The largest finite magnitude; 0 if there is none.
        smallest: The smallest magnitude that is not 0; 0 if there is none.
        exponents: Pairs `(k, count)`, in order: so many magnitudes are in `[2**k, 2**(k + 1))`.

    Example:

    >>> seen = magnitudes(np.array([0, 1, -3, 2, np.inf], "float32"))
    >>> seen.zeros, seen.nonfinite, seen.largest, seen.smallest, seen.exponents
    (1, 1, 3.0, 1.0, ((0, 1), (1, 2)))
    """

    size: int = 0
    zeros: int = 0
    nonfinite: int = 0
    largest: float = 0.0
    smallest: float = 0.0
    exponents: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: Magnitudes) -> Magnitudes:
        """Return the magnitudes of both together."""
        counts = dict(self.exponents)
        for exponent, count in other.exponents:
            counts[exponent] = counts.get(exponent, 0) + count
        return Magnitudes(
            self.size + other.size,
            self.zeros + other.zeros,
            self.nonfinite + other.nonfinite,
            max(self.largest, other.largest),
            min(filter(None, (self.smallest, other.smallest)), default=0.0),
            tuple(sorted(counts.items())),
        )

    def high(self, dtype: str) -> float:
        """Return the share of all numbers that are above half of the largest number of a dtype."""
        count = sum(count for exponent, count in self.exponents if exponent >= _HIGH[dtype])
        return count / self.size if self.size else 0.0

    def at_least(self, smallest: float) -> Magnitudes:
        """Return the magnitudes from about a number on, without zeros.

        Args:
            smallest: The number; rounded down to a power of two.
        """
        first = math.frexp(smallest)[1] - 1
        kept = tuple((exponent, count) for exponent, count in self.exponents if exponent >= first)
        return dataclasses.replace(self, exponents=kept, zeros=0)

    def overflowing(self, factor: float = 1.0) -> float:
        """Return the share of numbers other than 0 that are above float16's largest.

        Args:
            factor: By what they are multiplied first; rounded down to a power of two.
        """
        first = _HIGH["float16"] + 1 - (math.frexp(factor)[1] - 1)
        total = sum(count for _, count in self.exponents)
        lost = sum(count for exponent, count in self.exponents if exponent >= first)
        return lost / total if total else 0.0

    def vanishing(self, factor: float = 1.0) -> float:
        """Return the share of numbers other than 0 that float16 flushes to 0.

        Args:
            factor: By what they are multiplied first; rounded down to a power of two.
        """
        shift = math.frexp(factor)[1] - 1
        total = sum(count for _, count in self.exponents)
        lost = sum(count for exponent, count in self.exponents if exponent + shift <= _VANISHING)
        return lost / total if total else 0.0


def magnitudes(array: Any) -> Magnitudes:
    """Count the magnitudes of an array.

    Args:
        array: A NumPy array of floats; other dtypes than float32 are cast to it.
    """
    flat = np.ascontiguousarray(array, "float32").reshape(-1).view("uint32")
    counts = np.zeros(_EXPONENTS, "int64")
    zeros, largest, smallest = 0, 0, _INF
    for start in range(0, flat.size, _CHUNK):
        bits = flat[start : start + _CHUNK] & np.uint32(_MAGNITUDE)
        counts += np.bincount(bits >> np.uint32(_FRACTION), minlength=_EXPONENTS)
        zeros += bits.size - int(np.count_nonzero(bits))
        # All bits of 0 become 1, so that it is not the smallest; what is not finite becomes 0.
        largest = max(largest, int(np.max(bits * (bits < _INF), initial=0)))
        smallest = min(smallest, int(np.min(bits - np.uint32(1), initial=_INF)) + 1)
    finite = counts.copy()
    finite[-1] = 0
    finite[0] -= zeros
    return Magnitudes(
        size=flat.size,
        zeros=zeros,
        nonfinite=int(counts[-1]),
        largest=_number(largest),
        smallest=_number(smallest) if smallest < _INF else 0.0,
        exponents=tuple((int(i) - _BIAS, int(finite[i])) for i in np.flatnonzero(finite)),
    )


def _number(bits: int) -> float:
    return float(np.uint32(bits).view("float32"))
