"""Decides from numbers whether a step is at fault for the error of its outputs."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from kerasmp.probe.compare import EPSILON

if TYPE_CHECKING:
    from collections.abc import Callable

    from kerasmp.probe.compare import Comparison

# A step runs again if its error is larger than so many roundings, or than twice that of its inputs.
_SUSPICIOUS = 8
# It is at fault if its own error is larger than so many roundings.
FAULT = 16
# Rounding of the inputs explains an error up to this size, or so many times theirs.
_EXPLAINED = 0.125
_AMPLIFICATION = 8
# The share of values that may be flushed to 0.
FLUSHED = 0.01


class Verdict(enum.Enum):
    """What a step does, by its outputs."""

    FINE = "fine"
    CARRY = "carry"
    """It hands on infinities or zeros of earlier steps, which may not matter later."""
    EARLIER = "earlier"
    """An earlier step is at fault, whose infinities or zeros show here."""
    OVERFLOW = "overflow"
    """It returns infinities, where float32's values are outside the range."""
    BROKEN = "broken"
    """It returns infinities or NaN in place of values that half precision can hold."""
    UNDERFLOW = "underflow"
    """It returns zeros in place of small values."""
    ERROR = "error"
    """Its outputs are less accurate than the rounding of one operation explains."""
    SENSITIVE = "sensitive"
    """It makes the rounding of its inputs many times larger."""
    CHOICE = "choice"
    """Integers or bools differ."""

    @property
    def waits(self) -> bool:
        """Whether the step is at fault only if a later one computes with what it returns."""
        return self in {Verdict.OVERFLOW, Verdict.UNDERFLOW}


def is_at_fault(alone: Comparison, dtype: str) -> bool:
    """Return whether a step, run alone on rounded inputs and weights, is not accurate enough.

    Args:
        alone: The comparison of its output with that in float32.
        dtype: The dtype in which it computes.
    """
    return alone.nonfinite > 0 or alone.error > FAULT * EPSILON[dtype]


def judge(  # noqa: PLR0911 - a verdict each
    seen: Comparison,
    own: Callable[[], Comparison],
    error: float,
    dtype: str,
    *,
    has_troubles: bool,
) -> tuple[Verdict, Comparison]:
    """Decide what is wrong with an output of a step.

    Args:
        seen: The output beside that of float32.
        own: Returns the comparison with the output in float32 on rounded inputs and weights, which
            takes another run of the step.
        error: The largest relative error of the inputs.
        dtype: The dtype in which the step computes.
        has_troubles: Whether inputs have infinities or zeros that they lack in float32.

    Returns:
        The verdict, and the comparison that shows it.
    """
    rounding = EPSILON[dtype]
    if seen.differing:
        return Verdict.CHOICE, seen
    is_flushed = seen.flushed > FLUSHED * seen.nonzero
    is_off = seen.error > max(_SUSPICIOUS * rounding, 2 * error)
    if not (is_off or is_flushed or seen.saturated or seen.nonfinite):
        return Verdict.FINE, seen
    if has_troubles and not (is_off or seen.nonfinite):
        return Verdict.CARRY, seen
    alone = own()
    if alone.nonfinite:
        return Verdict.BROKEN, alone
    if alone.saturated:
        return Verdict.OVERFLOW, alone
    if is_at_fault(alone, dtype):
        return Verdict.ERROR, alone
    grows = seen.error > max(FAULT * rounding, 4 * error)
    if has_troubles and (seen.nonfinite or grows):
        return Verdict.EARLIER, seen
    if seen.nonfinite or seen.error > max(_EXPLAINED, _AMPLIFICATION * error):
        return Verdict.SENSITIVE, seen
    if alone.flushed > FLUSHED * alone.nonzero:
        return Verdict.UNDERFLOW, alone
    carries = has_troubles and (seen.saturated or is_flushed)
    return (Verdict.CARRY if carries else Verdict.FINE), seen
