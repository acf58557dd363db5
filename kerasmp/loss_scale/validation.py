"""Checks of the settings, the configuration and the state of a schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kerasmp.errors import (
    ArgumentTypeError,
    LossScaleError,
    LossScaleTypeError,
    check_bool,
    with_type,
)

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
LARGEST_SCALE = float(np.finfo(np.float32).max)


def _as_float32(number: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(number))


class _Rule(NamedTuple):
    """What a number must be.

    Attributes:
        expected: The rule in words.
        holds: Returns whether a number follows the rule. It must be False for NaN.
        convert: Returns the number as the schedule stores it.
    """

    expected: str
    holds: Callable[[float], bool]
    convert: Callable[[float], float] = float


def _between(low: float, high: float) -> _Rule:
    # The scale is a float32 number. A factor that float32 rounds to a bound would never move it.
    return _Rule(
        f"a finite float32 number between {low:g} and {high:g}, both excluded",
        lambda number: low < _as_float32(number) < high and _as_float32(number) >= SMALLEST_SCALE,
    )


_SCALE = _Rule(
    f"a number from {SMALLEST_SCALE:.3g} to {LARGEST_SCALE:.3g}, the range of float32",
    lambda number: SMALLEST_SCALE <= number <= LARGEST_SCALE,
    _as_float32,
)
_COUNT = _Rule(
    "an integer from 1 to 2147483647",
    lambda number: 1 <= number <= np.iinfo(np.int32).max and number.is_integer(),
    int,
)
_SHARE = _Rule("a number from 0 to 1, 1 excluded", lambda number: 0.0 <= number < 1.0)
_RULES = {
    **dict.fromkeys(("scale", "initial_scale", "min_scale", "max_scale"), _SCALE),
    **dict.fromkeys(("growth_interval", "hysteresis", "recovery_interval", "window"), _COUNT),
    **dict.fromkeys(("tolerance", "max_underflow"), _SHARE),
    **dict.fromkeys(("backoff_factor", "mean_decay", "variance_decay"), _between(0.0, 1.0)),
    "growth_factor": _between(1.0, math.inf),
    "deviations": _between(0.0, 100.0),
}


def settings(schedule: Any, cls: type) -> None:
    """Check the settings of a new schedule, and store each as a Python number.

    Args:
        schedule: The schedule. What a subclass adds to the settings is left alone.
        cls: The schedule's class in kerasmp, whose settings all have a rule.

    Raises:
        LossScaleError: If a setting breaks its rule, or the bounds do not enclose the first scale.
    """
    for field in dataclasses.fields(cls):
        name, value = field.name, getattr(schedule, field.name)
        if isinstance(field.default, bool):
            value = switch(name, value)
        elif name != "recovery_interval" or value is not None:
            value = _number(name, value, _RULES[name], f"The default is {field.default!r}.")
        object.__setattr__(schedule, name, value)
    enclosed(schedule)


def _number(name: str, value: Any, rule: _Rule, fix: str) -> float:
    number = math.nan  # which no rule accepts
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):  # of an int beyond float64
            number = float(value)
    if not rule.holds(number):
        raise LossScaleError(
            f"`{name}` has an invalid value.",
            received=repr(value),
            expected=rule.expected,
            fix=fix,
        )
    return rule.convert(number)


def scale(name: str, value: Any) -> float:
    """Return `value` as the nearest float32 number, if that is positive and normal."""
    return _number(name, value, _SCALE, "Powers of two such as 2.0**15 scale without rounding.")


def switch(name: str, value: Any) -> bool:
    """Return a setting that must be True or False."""
    check_bool(name, value, LossScaleTypeError)
    return bool(value)


def mapping(what: str, value: Any) -> dict[str, Any]:
    """Return a configuration or a state as a dict."""
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(
            f"{what} is not a dict.",
            received=with_type(value),
            expected="a dict",
            fix="get_config() and init() return one.",
        )
    return dict(value)


def complete(schedule: Any, state: Any) -> None:
    """Check that a state has every key that the schedule needs."""
    known = mapping("The state", state)
    missing = [key for key in schedule.init() if key not in known]
    if missing:
        raise LossScaleError(
            "The state does not belong to this schedule.",
            received=f"{sorted(map(str, known))}, without {missing}",
            expected=f"the keys {sorted(schedule.init())}",
            fix=f"Start with {type(schedule).__name__}.init(), then pass what update returned.",
        )


def enclosed(schedule: Any) -> None:
    """Check that the bounds of a schedule enclose its first scale."""
    low, first, high = schedule.min_scale, schedule.initial_scale, schedule.max_scale
    if low <= first <= high:
        return
    bound = "max_scale" if first > high else "min_scale"
    raise LossScaleError(
        "The bounds do not enclose the initial scale.",
        received=f"min_scale={low:g}, initial_scale={first:g}, max_scale={high:g}",
        expected="min_scale <= initial_scale <= max_scale",
        fix=f"Choose another initial_scale, or move the bound: "
        f"{type(schedule).__name__}(initial_scale={first!r}, {bound}={first!r}).",
    )
