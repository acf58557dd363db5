"""The checks that schedule constructors share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from kerasmp.errors import ArgumentTypeError, LossScaleError

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
LARGEST_SCALE = float(np.finfo(np.float32).max)


def _real(name: str, value: Any, expected: str, fix: str) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise LossScaleError(
            f"`{name}` cannot be used.", received=repr(value), expected=expected, fix=fix
        )
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf if value > 0.0 else -math.inf  # type: ignore[operator]  # Real has no order in typeshed


def scale(name: str, value: Any) -> float:
    """Return `value` as the nearest float32 number, which is positive and normal."""
    expected = f"a number from {SMALLEST_SCALE:.3g} to {LARGEST_SCALE:.3g}"
    fix = "Powers of two such as 2.0**15 scale without rounding."
    number = _real(name, value, expected, fix)
    if not SMALLEST_SCALE <= number <= LARGEST_SCALE:
        raise LossScaleError(
            f"`{name}` is outside the range of float32.",
            received=repr(value),
            expected=expected,
            fix=fix,
        )
    return float(np.float32(number))


def factor(name: str, value: Any, low: float, high: float, fix: str) -> float:
    """Return `value` as a float strictly between `low` and `high`, also once it is a float32."""
    expected = f"a finite float32 number between {low:g} and {high:g}, both excluded"
    number = _real(name, value, expected, fix)
    # The scale is one: what is rounded to a bound there would never move it, or for ever.
    with np.errstate(over="ignore", under="ignore"):
        held = float(np.float32(number))
    if not (math.isfinite(held) and low < held < high and abs(held) >= SMALLEST_SCALE):
        raise LossScaleError(
            f"`{name}` cannot be used.", received=repr(value), expected=expected, fix=fix
        )
    return number


def count(name: str, value: Any, fix: str) -> int:
    """Return `value` as an int of at least 1."""
    expected = "an integer from 1 to 2147483647"
    number = _real(name, value, expected, fix)
    if not (1 <= number <= np.iinfo(np.int32).max and number.is_integer()):
        raise LossScaleError(
            f"`{name}` cannot be used.", received=repr(value), expected=expected, fix=fix
        )
    return int(number)


def share(name: str, value: Any, fix: str) -> float:
    """Return `value` as a float from 0 up to but not including 1."""
    expected = "a number from 0 to 1, 1 excluded"
    number = _real(name, value, expected, fix)
    if not 0.0 <= number < 1.0:
        raise LossScaleError(
            f"`{name}` cannot be used.", received=repr(value), expected=expected, fix=fix
        )
    return number


def switch(name: str, value: Any) -> bool:
    """Return `value` as a bool."""
    if not isinstance(value, bool | np.bool_):
        raise LossScaleError(
            f"`{name}` cannot be used.",
            received=repr(value),
            expected="a bool, True or False",
            fix="Pass True or False.",
        )
    return bool(value)


def mapping(what: str, value: Any) -> dict[str, Any]:
    """Return a configuration or a state as a dict."""
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(
            f"{what} is no dict.",
            received=f"{value!r} of type {type(value).__name__}",
            expected="a dict",
            fix="get_config() and init() return such.",
        )
    return dict(value)


def complete(schedule: Any, state: Any) -> None:
    """Check that a state has all that the schedule keeps."""
    known = mapping("The state", state)
    missing = [key for key in schedule.init() if key not in known]
    if missing:
        raise LossScaleError(
            "The state is not one of this schedule.",
            received=f"{sorted(map(str, known))}, without {missing}",
            expected=f"the keys {sorted(schedule.init())}",
            fix=f"{type(schedule).__name__}.init() returns the first one, and update the next.",
        )


def enclosed(schedule: Any) -> None:
    """Check that the initial scale of a schedule lies inside its bounds."""
    low, first, high = schedule.min_scale, schedule.initial_scale, schedule.max_scale
    if low <= first <= high:
        return
    bound = "max_scale" if first > high else "min_scale"
    raise LossScaleError(
        "The bounds do not enclose the initial scale.",
        received=f"min_scale={low:g}, initial_scale={first:g}, max_scale={high:g}",
        expected="min_scale <= initial_scale <= max_scale",
        fix=f"Choose another initial_scale, or move the bound that it crosses: "
        f"{type(schedule).__name__}(initial_scale={first!r}, {bound}={first!r}).",
    )
