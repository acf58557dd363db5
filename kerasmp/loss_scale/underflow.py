"""The scale that grows only while gradients are flushed to zero, and growing helps."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import keras
from keras import ops

from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale, State, either
from kerasmp.loss_scale.slump import FLOOR, ONE, QUICK, is_slump, level_before

# A growth was worth it if it took away this part of the share at least.
WORTH = 0.1
# So nearly all values are zero that nothing can be told from the share: only a growth will show.
ALL = 0.999
# What `steps_to_wait` is while overflows follow each other, and while the scale comes back after
# them; `underflow_before` is the scale to come back to then.
FALLING, RETURNING = -2, -1


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class UnderflowLossScale(LossScale):
    """Up while too many gradient values are flushed to zero, down on overflow.

    `DynamicLossScale` climbs until it overflows, and loses a step each time. This one measures what
    a higher scale could win: the estimated share of gradient values that float16 flushed to zero,
    averaged over `window` good steps. Above `max_underflow` the scale grows. If the share has then
    not fallen by a tenth, the zeros are of another making (of a ReLU, of padding), and the scale
    stays until the share changes by a tenth. An overflow backs off, and for `growth_interval` good
    steps after it nothing grows; but after a slump, overflows in a row that took the scale to 1/256
    or less, or any fall below 1, each good step makes up for one of them.

    Measuring costs a pass over the gradients in each step.

    Args:
        initial_scale: The first scale, default 32768.
        max_underflow: The share of flushed gradient values that is accepted, from 0 up to but not
            including 1, default 0.001.
        window: Good steps over which the share is averaged, default 100.
        growth_factor: More than 1, default 2.
        backoff_factor: Between 0 and 1, default 0.5.
        growth_interval: Good steps after an overflow before the scale may grow, default 2000.
        min_scale: The floor, default 2**-14.
        max_scale: The ceiling, default 2**24.

    Raises:
        LossScaleError: For any value outside these ranges, or bounds that do not enclose
            `initial_scale`.

    References:
        Zhao et al., Adaptive Loss Scaling for Mixed Precision Training, 2019,
        https://arxiv.org/abs/1910.12385, which sets the scale of each layer by its estimated
        underflow; the rule for one scale, by what is measured, is our own.

    Example:

    >>> schedule = UnderflowLossScale(window=1)
    >>> float(schedule.update(schedule.init(), finite=True, underflow=0.2)["scale"])
    65536.0
    >>> float(schedule.update(schedule.init(), finite=True, underflow=0.0)["scale"])
    32768.0
    """

    measures: ClassVar[tuple[str, ...]] = ("underflow",)

    initial_scale: float = 2.0**15
    max_underflow: float = 0.001
    window: int = 100
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = FLOOR
    max_scale: float = 2.0**24

    def __post_init__(self) -> None:
        validation.settings(self, UnderflowLossScale)

    def init(self) -> State:
        """Return the state before the first step.

        `underflow_sum` is that of the present window, `underflow_before` the share at which the
        scale grew last (0 if it did not), `steps_to_wait` what an overflow left to wait for.
        """
        return {
            **super().init(),
            "underflow_sum": 0.0,
            "underflow_before": 0.0,
            "steps_to_wait": 0,
        }

    def update(self, state: State, finite: Any, underflow: Any = 0.0) -> State:
        """Return the state after a step; see the class for the rule.

        Args:
            state: The dict of `init`.
            finite: Scalar bool, whether every gradient was finite.
            underflow: Scalar from 0 to 1, the share of gradient values that were flushed to zero;
                0, the default, if it is not known.
        """
        scale, state = self.read(state)
        none = ops.zeros_like(state["step_counter"])
        good = self._after_good(state, scale, ops.convert_to_tensor(underflow, dtype="float32"))
        lower = ops.maximum(scale * self.backoff_factor, self.min_scale)
        wait, before = state["steps_to_wait"], state["underflow_before"]
        target = ops.where(wait == RETURNING, before, 0.0)
        level = level_before(scale, lower, state["step_counter"], target)
        bad = {
            "scale": lower,
            "step_counter": none,
            "underflow_sum": 0.0,
            "underflow_before": ops.where(wait == FALLING, before, level),
            "steps_to_wait": none + FALLING,
        }
        return {key: either(finite, good[key], bad[key]) for key in good}

    def _after_good(self, state: State, scale: Any, underflow: Any) -> State:
        steps = state["step_counter"] + 1
        none = ops.zeros_like(steps)
        wait = state["steps_to_wait"]
        level = ops.minimum(state["underflow_before"], self.max_scale)
        fell = wait == FALLING
        back = ops.logical_or(
            ops.logical_and(fell, is_slump(scale, level)),
            ops.logical_and(wait == RETURNING, scale < level),
        )
        # After the overflow, and after the return. Below 1 that is over as soon as it is back.
        rest = ops.where(level < scale, none, none + self.growth_interval)
        wait = ops.where(fell, rest, wait)
        waiting = ops.maximum(wait - 1, none)
        # A broken sum that was loaded must not last longer than its window.
        total = state["underflow_sum"] + underflow
        # Below 1 overflows leave no time for a long one, where data are bad now and then.
        window = ops.where(scale < ONE, none + min(self.window, QUICK), none + self.window)
        share = ops.where(ops.isfinite(total), total / ops.cast(window, "float32"), 0.0)
        before = ops.where(state["steps_to_wait"] < 0, 0.0, level)
        # Not "has it fallen": a share that has risen belongs to other gradients than before.
        changed = ops.logical_not(ops.abs(share - before) < WORTH * before)
        full = steps % window == 0
        grow = ops.logical_and(
            ops.logical_and(full, waiting == 0),
            ops.logical_and(share > self.max_underflow, ops.logical_or(changed, share > ALL)),
        )
        higher = ops.minimum(scale * self.growth_factor, self.max_scale)
        returned = ops.minimum(higher, level)
        there = ops.logical_not(returned < level)
        rest = ops.where(returned <= ONE, none, none + self.growth_interval)
        moved = ops.logical_or(back, grow)
        return {
            "scale": ops.where(back, returned, ops.where(grow, higher, scale)),
            "step_counter": ops.where(moved, none, steps),
            "underflow_sum": ops.where(ops.logical_or(back, full), 0.0, total),
            "underflow_before": ops.where(
                back, ops.where(there, 0.0, level), ops.where(grow, share, before)
            ),
            "steps_to_wait": ops.where(back, ops.where(there, rest, none + RETURNING), waiting),
        }
