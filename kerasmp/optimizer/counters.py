"""The counters of the wrapped optimizer, all in one variable."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from kerasmp.optimizer.causes import CAUSES

# A step that is fine adds `APPLIED`, and no more: one kernel. So how many steps were skipped in a
# row up to now cannot be one of them, but follows from the last streak of skipped steps: how long
# it was, and how many steps had been applied then.
COUNTERS = ("applied_steps", "skipped_steps", "streak", "applied_before_streak", *CAUSES)
APPLIED = np.array([int(name == "applied_steps") for name in COUNTERS])


def with_skip(counts: Any, cause: Any) -> Any:
    """Return the counters after a skipped step.

    Args:
        counts: Integer vector over `COUNTERS`.
        cause: Its cause, a position in `CAUSES`.
    """
    counts = ops.convert_to_tensor(counts)
    index = ops.arange(len(COUNTERS))
    hit = ops.logical_or(
        index == COUNTERS.index("skipped_steps"),
        index == ops.cast(cause, index.dtype) + COUNTERS.index(CAUSES[0]),
    )
    after = counts + ops.cast(hit, counts.dtype)
    after = ops.where(index == COUNTERS.index("streak"), consecutive_skips(counts) + 1, after)
    applied = counts[COUNTERS.index("applied_steps")]
    return ops.where(index == COUNTERS.index("applied_before_streak"), applied, after)


def consecutive_skips(counts: Any) -> Any:
    """Return how many steps were skipped in a row up to now.

    Args:
        counts: Integer vector over `COUNTERS`.
    """
    counts = ops.convert_to_tensor(counts)
    applied, before, streak = (
        counts[COUNTERS.index(name)]
        for name in ("applied_steps", "applied_before_streak", "streak")
    )
    return ops.where(applied == before, streak, ops.zeros_like(streak))


def skipped_last(counts: Any) -> Any:
    """Return whether `counts`, a vector over `COUNTERS`, say that the last step was skipped."""
    return consecutive_skips(counts) > 0


def skipped_in_all(counts: Any) -> Any:
    """Return how many steps were skipped, by `counts`, a vector over `COUNTERS`."""
    return ops.convert_to_tensor(counts)[COUNTERS.index("skipped_steps")]
