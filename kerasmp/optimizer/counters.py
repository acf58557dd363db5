"""The counters of the wrapped optimizer, all in one variable."""

from __future__ import annotations

from typing import Any

from keras import ops

from kerasmp.optimizer.causes import CAUSES

# One variable holds all counters: a step that is fine then writes one and not three.
COUNTERS = ("applied_steps", "skipped_steps", "consecutive_skips", *CAUSES)


def counted(counts: Any, cause: Any) -> Any:
    """Return the counters after a step.

    Args:
        counts: Integer vector over `COUNTERS`.
        cause: None if the step was applied, else a position in `CAUSES`.
    """
    counts = ops.convert_to_tensor(counts)
    if cause is None:
        keep = [name != "consecutive_skips" for name in COUNTERS]
        add = [name == "applied_steps" for name in COUNTERS]
        return counts * ops.cast(keep, counts.dtype) + ops.cast(add, counts.dtype)
    place = ops.arange(len(COUNTERS))
    skip = ops.logical_or(
        place == COUNTERS.index("skipped_steps"), place == COUNTERS.index("consecutive_skips")
    )
    hit = place == ops.cast(cause, place.dtype) + COUNTERS.index(CAUSES[0])
    return counts + ops.cast(ops.logical_or(skip, hit), counts.dtype)


def skipped_last(counts: Any) -> Any:
    """Return whether `counts`, a vector over `COUNTERS`, say that the last step was skipped."""
    return ops.convert_to_tensor(counts)[COUNTERS.index("consecutive_skips")] > 0


def skipped_in_all(counts: Any) -> Any:
    """Return how many steps were skipped, by `counts`, a vector over `COUNTERS`."""
    return ops.convert_to_tensor(counts)[COUNTERS.index("skipped_steps")]
