"""The schedule that grows only while gradients are flushed to zero and growth helps."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import keras
from keras import ops

from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale, State, either
from kerasmp.loss_scale.slump import (
    DEFAULT_MIN_SCALE,
    SHORT_INTERVAL,
    is_slump,
    level_before,
)

# The share must fall by this part of itself, or the growth of the scale did not help.
SMALLEST_CHANGE = 0.1
# At a larger share, nearly all values are zero, and only a growth can show whether it helps.
NEARLY_ALL = 0.999
# Negative values of `steps_to_wait`: the last step overflowed, or the scale recovers from that.
# `underflow_before` is then the scale to recover to, and not a share. Variables of their own would
# be plainer, but then lists of weights that earlier versions saved would no longer fit, since they
# have one value for each variable.
FALLING, RETURNING = -2, -1


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class UnderflowLossScale(LossScale):
    """A scale that grows while too many gradients are flushed to zero, and falls at overflows.

    `DynamicLossScale` grows until it overflows, and loses a step each time. This schedule measures
    what a higher scale could win: the estimated share of gradient values that float16 flushed to
    zero, averaged over `window` good steps. Above `max_underflow` the scale grows. If the share has
    then not fallen by a tenth, the zeros have other reasons (a ReLU or padding), and the scale
    stays until the share changes by a tenth.

    An overflow lowers the scale, which then does not grow for `growth_interval` good steps. The
    exception is a slump, which is a run of overflows that took the scale to 1/256 or less, or any
    fall below 1. After it the scale grows at each good step until it is back where it was.

    Measuring takes a pass over the gradients in each step.

    Args:
        initial_scale: The first scale, default 32768.
        max_underflow: The share of flushed gradient values that is accepted. From 0 to 1, 1
            excluded, default 0.001.
        window: Good steps over which the share is averaged, default 100.
        growth_factor: What the scale is multiplied by when it grows. More than 1, default 2.
        backoff_factor: What the scale is multiplied by at an overflow. Between 0 and 1, default
            0.5.
        growth_interval: Good steps after an overflow before the scale may grow, default 2000.
        min_scale: The smallest scale, default 2**-14.
        max_scale: The largest scale, default 2**24.

    Raises:
        LossScaleError: If a value is outside its range, or the bounds do not enclose
            `initial_scale`.

    References:
        Zhao et al., Adaptive Loss Scaling for Mixed Precision Training, 2019,
        https://arxiv.org/abs/1910.12385, which sets the scale of each layer by its estimated
        underflow. The rule for one scale and a measured share is new here.

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
    min_scale: float = DEFAULT_MIN_SCALE
    max_scale: float = 2.0**24

    def __post_init__(self) -> None:
        validation.settings(self, UnderflowLossScale)

    def init(self) -> State:
        """Return the state before the first step.

        `underflow_sum` is the sum of the shares in the present window, `underflow_before` the share
        at the last growth (0 if there was none), and `steps_to_wait` how many good steps must pass
        before the next one.
        """
        return {
            **super().init(),
            "underflow_sum": 0.0,
            "underflow_before": 0.0,
            "steps_to_wait": 0,
        }

    def update(self, state: State, finite: Any, underflow: Any = 0.0) -> State:
        """Return the state after a step. The class describes the rule.

        Args:
            state: A dict with the keys of `init`.
            finite: Whether every gradient was finite, as a scalar.
            underflow: The share of gradient values that were flushed to zero, as a scalar from 0 to
                1. The default is 0, which means that it is not known.
        """
        scale, state = self.read(state)
        zero = ops.zeros_like(state["step_counter"])
        good = self._after_good(state, scale, ops.convert_to_tensor(underflow, dtype="float32"))
        lower = ops.maximum(scale * self.backoff_factor, self.min_scale)
        wait, before = state["steps_to_wait"], state["underflow_before"]
        target = ops.where(wait == RETURNING, before, 0.0)
        level = level_before(scale, lower, state["step_counter"], target)
        bad = {
            "scale": lower,
            "step_counter": zero,
            "underflow_sum": 0.0,
            "underflow_before": ops.where(wait == FALLING, before, level),
            "steps_to_wait": zero + FALLING,
        }
        return {key: either(finite, good[key], bad[key]) for key in good}

    def _after_good(self, state: State, scale: Any, underflow: Any) -> State:
        steps = state["step_counter"] + 1
        zero = ops.zeros_like(steps)
        wait = state["steps_to_wait"]
        level = ops.minimum(state["underflow_before"], self.max_scale)
        after_run = wait == FALLING
        recover = ops.logical_or(
            ops.logical_and(after_run, is_slump(scale, level)),
            ops.logical_and(wait == RETURNING, scale < level),
        )
        # After an overflow without a slump. Below 1 there is nothing to wait for once it is back.
        usual_wait = ops.where(level < scale, zero, zero + self.growth_interval)
        wait = ops.where(after_run, usual_wait, wait)
        waiting = ops.maximum(wait - 1, zero)
        # Below 1, with bad data now and then, overflows would cut a long window short.
        window = ops.where(scale < 1, zero + min(self.window, SHORT_INTERVAL), zero + self.window)
        # A sum that was loaded as inf or NaN must not last longer than its window.
        total = state["underflow_sum"] + underflow
        share = ops.where(ops.isfinite(total), total / ops.cast(window, "float32"), 0.0)
        before = ops.where(state["steps_to_wait"] < 0, 0.0, level)
        # Changed in either direction: a share that has risen is that of other gradients.
        changed = ops.logical_not(ops.abs(share - before) < SMALLEST_CHANGE * before)
        full = steps % window == 0
        grow = ops.logical_and(
            ops.logical_and(full, waiting == 0),
            ops.logical_and(
                share > self.max_underflow, ops.logical_or(changed, share > NEARLY_ALL)
            ),
        )
        higher = ops.minimum(scale * self.growth_factor, self.max_scale)
        recovered = ops.minimum(higher, level)
        complete = ops.logical_not(recovered < level)
        wait_after = ops.where(recovered <= 1, zero, zero + self.growth_interval)
        moved = ops.logical_or(recover, grow)
        return {
            "scale": ops.where(recover, recovered, ops.where(grow, higher, scale)),
            "step_counter": ops.where(moved, zero, steps),
            "underflow_sum": ops.where(ops.logical_or(recover, full), 0.0, total),
            "underflow_before": ops.where(
                recover, ops.where(complete, 0.0, level), ops.where(grow, share, before)
            ),
            "steps_to_wait": ops.where(
                recover, ops.where(complete, wait_after, zero + RETURNING), waiting
            ),
        }
