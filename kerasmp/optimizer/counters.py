"""The counters of the wrapped optimizer, and the causes of skipped steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

# Why a step was skipped, in the order in which the causes are counted.
CAUSES = ("loss", "gradients", "floor", "unknown")

# A good step adds `APPLIED` and nothing else, which takes one kernel. The number of steps skipped
# in a row is therefore not a counter. It follows from the last run of skipped steps: how long the
# run was, and how many steps had been applied before it.
COUNTERS = ("applied_steps", "skipped_steps", "streak", "applied_before_streak", *CAUSES)
APPLIED = np.array([int(name == "applied_steps") for name in COUNTERS])


def cause_of(loss_finite: Any, scale: Any, min_scale: float) -> Any:
    """Return the cause of a skipped step, as an index into `CAUSES`.

    - "loss": the loss itself was inf or NaN. No scale helps: the forward pass, the labels or the
      data are to blame.
    - "gradients": the loss was finite and a gradient was not. The scale is presumed too high.
    - "floor": the same, but the scale cannot fall further. Either the gradient of an operation is
      NaN, or gradients lie beyond float16.
    - "unknown": the loss is not known.

    Args:
        loss_finite: Scalar bool tensor, or None if the loss is not known.
        scale: The scale of the step.
        min_scale: The smallest scale of the schedule.
    """
    if loss_finite is None:
        return ops.full((), CAUSES.index("unknown"), dtype="int32")
    with_finite_loss = ops.where(
        ops.convert_to_tensor(scale) > min_scale, CAUSES.index("gradients"), CAUSES.index("floor")
    )
    return ops.where(loss_finite, with_finite_loss, CAUSES.index("loss"))


# In the functions below, `counts` is an integer vector over `COUNTERS`.


def count_skip(counts: Any, cause: Any) -> Any:
    """Return the counters after a skipped step; `cause` is an index into `CAUSES`."""
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
    """Return how many steps in a row were skipped, up to the last step."""
    counts = ops.convert_to_tensor(counts)
    applied, before, streak = (
        counts[COUNTERS.index(name)]
        for name in ("applied_steps", "applied_before_streak", "streak")
    )
    return ops.where(applied == before, streak, ops.zeros_like(streak))


def last_step_skipped(counts: Any) -> Any:
    """Return whether the last step was skipped."""
    return consecutive_skips(counts) > 0


def skipped_steps(counts: Any) -> Any:
    """Return how many steps were skipped in all."""
    return ops.convert_to_tensor(counts)[COUNTERS.index("skipped_steps")]


# One number for each variable counts two kinds of steps: those whose gradient was not finite, and
# NAN times those whose gradient had a NaN. A second variable would be missing in the files and the
# TensorFlow checkpoints of earlier versions, and would move others to another place in them.
NAN = 2**16
_MOST_NAN = 2**15 - 1  # the largest that still fits int32


def count_nonfinite(numbers: Any, nonfinite: Any, nan: Any) -> Any:
    """Return the numbers of all variables after a skipped step.

    A count that has reached its largest value, 65535 or 32767, stays there.

    Args:
        numbers: Integer vector, a number for each variable.
        nonfinite: For each variable, 1 if its gradient was not finite, else 0.
        nan: The same for NaN.
    """
    before, before_nan = split_nonfinite(numbers)
    return ops.minimum(before + nonfinite, NAN - 1) + ops.minimum(before_nan + nan, _MOST_NAN) * NAN


def split_nonfinite(numbers: Any) -> tuple[Any, Any]:
    """Return how many steps had a gradient that was not finite, and one with a NaN."""
    return numbers % NAN, numbers // NAN
