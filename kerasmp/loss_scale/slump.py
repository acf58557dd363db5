"""Runs of overflows: where the scale was before one, and whether it has to come back."""

from __future__ import annotations

from typing import Any

from keras import ops

# The default floor: float16's largest number over it is 1e9, a larger gradient than any sum needs.
FLOOR = 2.0**-14

# So many times smaller after a run of overflows: more than a search for the scale needs.
SLUMP = 256.0

# Good steps that pass before the scale grows where it is in a hurry.
QUICK = 20

# Below it gradients are made smaller: nobody wants that but for those that do not fit.
ONE = 1.0


def level_before(scale: Any, lower: Any, step_counter: Any, target: Any) -> Any:
    """Return the scale to come back to after the run of overflows that begins here.

    Below 1, an overflow right after the scale has grown tells that it had been high enough: it is
    `lower`. While it comes back from 1 or more one such overflow may be chance, and `lower` shall
    be tried once more: less than that says so. So it does at a floor below 1, where an overflow
    lowers nothing, and nothing has to be made up for.

    Args:
        scale: That of the step.
        lower: What the overflow makes of it.
        step_counter: The good steps since the scale moved or a step was skipped.
        target: The scale that it was coming back to; anything below 1 if it was not.
    """
    tried = ops.logical_and(lower < ONE, step_counter == 0)
    level = ops.where(tried, ops.where(target >= ONE, lower * 0.5, lower), scale)
    stays = ops.logical_and(lower >= scale, scale < ONE)
    return ops.where(stays, scale * 0.5, level)


def is_slump(scale: Any, before: Any) -> Any:
    """Return whether a run of overflows took the scale further down than a search for it would.

    Args:
        scale: The scale after the run, that of a good step.
        before: What `level_before` said.
    """
    return ops.where(scale < ONE, scale < before, scale * SLUMP <= before)
