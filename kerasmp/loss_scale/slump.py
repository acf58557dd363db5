"""Runs of overflows: what the scale was before one, and whether it has to recover from it."""

from __future__ import annotations

from typing import Any

from keras import ops

# float16's largest number divided by this floor is 1e9. No sum needs a larger gradient.
DEFAULT_MIN_SCALE = 2.0**-14

# A search for the right scale takes fewer halvings than this fall.
SLUMP_FACTOR = 256.0

# Good steps before the scale grows while it recovers.
SHORT_INTERVAL = 20


def level_before(scale: Any, lower: Any, step_counter: Any, target: Any) -> Any:
    """Return the scale to recover to after the run of overflows that begins here.

    This is the scale of the step, with two exceptions below 1:

    - If the scale has just grown, the growth was too much, and `lower` is right. A recovery from
      1 or more tries `lower` once more, since one overflow may be chance. A level below `lower`
      says so.
    - If `lower` is the floor and the scale is there already, nothing was lost.

    Args:
        scale: The scale of the step.
        lower: The scale after the overflow.
        step_counter: Good steps since the scale moved or a step was skipped.
        target: The scale of a recovery that was going on; anything below 1 if there was none.
    """
    just_grown = ops.logical_and(lower < 1, step_counter == 0)
    level = ops.where(just_grown, ops.where(target >= 1, lower * 0.5, lower), scale)
    at_floor = ops.logical_and(lower >= scale, scale < 1)
    return ops.where(at_floor, scale * 0.5, level)


def is_slump(scale: Any, before: Any) -> Any:
    """Return whether a run of overflows lowered the scale more than a search for it would.

    Args:
        scale: The scale after the run, at a good step.
        before: The level that `level_before` returned.
    """
    return ops.where(scale < 1, scale < before, scale * SLUMP_FACTOR <= before)
