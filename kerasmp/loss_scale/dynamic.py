"""The schedule that raises the scale after many good steps and lowers it at overflows."""

from __future__ import annotations

import dataclasses
from typing import Any

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


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class DynamicLossScale(LossScale):
    """A scale that grows after `growth_interval` good steps in a row, and falls at overflows.

    The scale always stays between `min_scale` and `max_scale`, even if another value was loaded.
    It neither falls to 0 nor rises to infinity.

    Args:
        initial_scale: The first scale, default 32768. A high value is safe: the scale comes down in
            a few steps.
        growth_factor: What the scale is multiplied by when it grows. More than 1, default 2.
        backoff_factor: What the scale is multiplied by at an overflow. Between 0 and 1, default
            0.5.
        growth_interval: Steps in a row with finite gradients before the scale grows, default 2000.
        hysteresis: The number of the overflow that lowers the scale, default 1; those before it are
            tolerated. As in Megatron-LM, overflows count even with good steps between them, the
            count starts again only when the scale grows, and every overflow after this one lowers
            the scale.
        consecutive_hysteresis: Whether every good step starts that count again, as in apex, and in
            DeepSpeed with `consecutive_hysteresis`; default False. It has no effect if
            `hysteresis` is 1.
        tolerance: The share of overflows, among the steps since the scale last moved, at which an
            overflow lowers the scale. From 0 to 1, 1 excluded. As in fairseq; with 0, the default,
            every overflow does.
        recovery_interval: Good steps before the scale grows during a recovery, if this is less than
            `growth_interval`; default 20. A recovery follows a slump, which is a run of overflows
            that took the scale to 1/256 or less. It ends when the scale is back where it was, or at
            the next overflow. Below 1, any fall is a slump, and the scale grows at every good step
            of the recovery. If it stays below 1 with nothing to recover from (at the floor, or if
            the overflow was tolerated), it also grows after this many good steps, until a growth
            overflows. With None there is no recovery, as in Keras, PyTorch and apex.
        min_scale: The smallest scale, default 2**-14. Sums over a batch, or large sample weights,
            may need a scale far below 1.
        max_scale: The largest scale, default 2**24.

    Raises:
        LossScaleError: If a value is outside its range, or the bounds do not enclose
            `initial_scale`.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740;
        the defaults are those of Keras, PyTorch's GradScaler and NVIDIA apex (ceiling 2**24),
        to which the recovery is added.
        Ott et al., fairseq, 2019, https://arxiv.org/abs/1904.01038 (tolerance).

    Example:

    >>> schedule = DynamicLossScale(initial_scale=8.0, growth_interval=2)
    >>> float(schedule.update(schedule.init(), finite=False)["scale"])
    4.0
    """

    initial_scale: float = 2.0**15
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = DEFAULT_MIN_SCALE
    max_scale: float = 2.0**24
    consecutive_hysteresis: bool = False
    tolerance: float = 0.0
    recovery_interval: int | None = SHORT_INTERVAL

    def __post_init__(self) -> None:
        validation.settings(self, DynamicLossScale)

    def init(self) -> State:
        """Return the state before the first step, with a key for each part of the rule in use."""
        state: State = super().init()
        if self.hysteresis > 1:
            state["hysteresis_left"] = self.hysteresis
        if self.tolerance > 0:
            state |= {"steps_since_change": 0, "overflows_since_change": 0}
        if self.recovery_interval is not None:
            state["recover_to"] = 0.0
        return state

    def only_counts(self, state: State) -> Any:
        """Return whether no growth and no recovery is due, and the scale is inside the bounds."""
        if self.hysteresis > 1 or self.tolerance > 0:  # their counts change at good steps, too
            return None
        scale = state["scale"]
        inside = (scale >= self.min_scale) & (scale <= self.max_scale)
        not_due = inside & (state["step_counter"] < self.growth_interval - 1)
        if self.recovery_interval is None:
            return not_due
        return not_due & (scale >= 1) & (state["recover_to"] == 0.0)

    def update(self, state: State, finite: Any) -> State:
        """Return the state after a step. The class describes the rule."""
        scale, state = self.read(state)
        if self.hysteresis > 1:
            # A schedule with another hysteresis may have saved a larger count.
            state["hysteresis_left"] = ops.clip(state["hysteresis_left"], 0, self.hysteresis)
        if isinstance(finite, bool):
            return self._after_good(state, scale) if finite else self._after_bad(state, scale)
        good, bad = self._after_good(state, scale), self._after_bad(state, scale)
        return {key: ops.where(finite, good[key], bad[key]) for key in good}

    def _after_good(self, state: State, scale: Any) -> State:
        steps = state["step_counter"] + 1
        zero = ops.zeros_like(steps)
        interval: Any = self.growth_interval
        # Near the largest float32 number the product may be inf. The minimum corrects it.
        higher = ops.minimum(scale * self.growth_factor, self.max_scale)
        if self.recovery_interval is not None:
            target = self._recovery_target(state, scale)
            recovering, below_one = target > scale, scale < 1
            # Tensors, since two Python numbers would not have the dtype of the counter.
            short, usual = (
                ops.full_like(steps, n)
                for n in (min(self.recovery_interval, self.growth_interval), self.growth_interval)
            )
            # After a growth below 1 that overflowed, the target is the scale itself.
            untried = ops.logical_and(below_one, target == 0.0)
            interval = ops.where(
                recovering,
                ops.where(below_one, zero + 1, short),
                ops.where(untried, short, usual),
            )
            higher = ops.where(recovering, ops.minimum(higher, target), higher)
        grow = steps >= interval
        after: State = {
            "scale": ops.where(grow, higher, scale),
            "step_counter": ops.where(grow, zero, steps),
        }
        if self.hysteresis > 1:
            left = state["hysteresis_left"]
            full = ops.full_like(left, self.hysteresis)
            after["hysteresis_left"] = (
                full if self.consecutive_hysteresis else ops.where(grow, full, left)
            )
        if self.tolerance > 0:
            after["steps_since_change"] = ops.where(grow, zero, state["steps_since_change"] + 1)
            after["overflows_since_change"] = ops.where(grow, zero, state["overflows_since_change"])
        if self.recovery_interval is not None:
            stays_below = ops.logical_and(below_one, ops.logical_not(grow))
            unfinished = ops.logical_or(after["scale"] < target, stays_below)
            after["recover_to"] = ops.where(unfinished, target, 0.0)
        return after

    def _after_bad(self, state: State, scale: Any) -> State:
        zero = ops.zeros_like(state["step_counter"])
        after: State = {"step_counter": zero}
        back_off: Any = True
        if self.hysteresis > 1:
            left = state["hysteresis_left"]
            after["hysteresis_left"] = ops.maximum(left - 1, ops.zeros_like(left))
            back_off = after["hysteresis_left"] <= 0
        if self.tolerance > 0:
            steps = state["steps_since_change"] + 1
            overflows = state["overflows_since_change"] + 1
            share = ops.cast(overflows, "float32") / ops.cast(steps, "float32")
            back_off = ops.logical_and(back_off, share >= self.tolerance)
            after["steps_since_change"] = ops.where(back_off, zero, steps)
            after["overflows_since_change"] = ops.where(back_off, zero, overflows)
        lower = ops.maximum(scale * self.backoff_factor, self.min_scale)
        after["scale"] = either(back_off, lower, scale)
        if self.recovery_interval is not None:
            in_run, stored = _decoded(state)
            level = level_before(scale, lower, state["step_counter"], stored)
            after["recover_to"] = -ops.where(in_run, stored, level)  # in a run: see `_decoded`
        return after

    def _recovery_target(self, state: State, scale: Any) -> Any:
        """Return the scale at which the recovery ends, or 0 if there is none.

        Only the first good step after a run of overflows can tell whether it was a slump. Below 1
        the target is the scale itself if a growth has just overflowed.
        """
        after_run, stored = _decoded(state)
        recover = ops.logical_or(
            is_slump(scale, stored), ops.logical_and(scale < 1, scale == stored)
        )
        # An overflow that was tolerated did not lower the scale. In a run, once one has lowered it,
        # so do all that follow.
        if self.hysteresis > 1:
            recover = ops.logical_and(recover, state["hysteresis_left"] <= 0)
        if self.tolerance > 0:
            recover = ops.logical_and(recover, state["steps_since_change"] == 0)
        target = ops.where(ops.logical_and(after_run, ops.logical_not(recover)), 0.0, stored)
        # A schedule with a larger max_scale may have saved a target that is never reached here.
        return ops.minimum(target, self.max_scale)


def _decoded(state: State) -> tuple[Any, Any]:
    """Return whether the last step overflowed, and the scale that `recover_to` holds.

    That is the scale before the run of overflows, or the target of the recovery after it; 0 if
    there is neither. The sign of `recover_to` says which: it is negative in a run. A variable of
    its own would be plainer, but then lists of weights that earlier versions saved would no longer
    fit, since they have one value for each variable.
    """
    return state["recover_to"] < 0, ops.abs(state["recover_to"])
