"""The scale that follows the gradients: up after a quiet interval, down on overflow."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale, State, either
from kerasmp.loss_scale.slump import FLOOR, ONE, QUICK, is_slump, level_before


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class DynamicLossScale(LossScale):
    """Up by `growth_factor` after `growth_interval` good steps, down on overflow.

    The scale stays between `min_scale` and `max_scale`, whatever happens and whatever was loaded:
    it neither sinks to 0 nor climbs to infinity.

    Args:
        initial_scale: The first scale, default 32768. High is safe: it backs off in a few steps.
        growth_factor: More than 1, default 2.
        backoff_factor: Between 0 and 1, default 0.5.
        growth_interval: Steps in a row with finite gradients before the scale grows, default 2000.
        hysteresis: Overflows that are tolerated before the scale backs off, counting the one that
            makes it back off, default 1 (the first). As in Megatron-LM, the allowance is used up
            by overflows that need not be consecutive and is refilled only when the scale grows;
            once it is used up every overflow backs off.
        consecutive_hysteresis: Refill that allowance at every good step, as apex does, and
            DeepSpeed with `consecutive_hysteresis`; default False. Without effect if `hysteresis`
            is 1.
        tolerance: The share of overflows, from 0 up to but not including 1, that is accepted
            since the scale last moved: it backs off only once the share reaches this. As in
            fairseq; default 0, every overflow counts.
        recovery_interval: After a slump, overflows in a row that took the scale to 1/256 or less,
            it grows after this many good steps if that is fewer than `growth_interval`, until it
            is back where it was or the next overflow. Default 20. Below 1 any fall is a slump, and
            each good step makes up for an overflow; if none had to be made up for, as at the
            floor or where it was tolerated, the scale grows after this many, until a growth
            overflows. None climbs as slowly as ever, as
            Keras, PyTorch and apex do.
        min_scale: The floor, default 2**-14. Sums over a batch, or large sample weights, may need
            a scale far below 1.
        max_scale: The ceiling, default 2**24.

    Raises:
        LossScaleError: For any value outside these ranges, or bounds that do not enclose
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
    min_scale: float = FLOOR
    max_scale: float = 2.0**24
    consecutive_hysteresis: bool = False
    tolerance: float = 0.0
    recovery_interval: int | None = QUICK

    def __post_init__(self) -> None:
        validation.settings(self, DynamicLossScale)

    def init(self) -> State:
        """Return the state before the first step; what is not in use has no place in it."""
        state: State = super().init()
        if self.hysteresis > 1:
            state["hysteresis_left"] = self.hysteresis
        if self.tolerance > 0:
            state |= {"steps_since_change": 0, "overflows_since_change": 0}
        if self.recovery_interval is not None:
            state["recover_to"] = 0.0
        return state

    def only_counts(self, state: State) -> Any:
        """Return whether nothing is due: no growth, no recovery, no bound to be kept."""
        if self.hysteresis > 1 or self.tolerance > 0:  # which count good steps, too
            return None
        scale = state["scale"]
        inside = (scale >= self.min_scale) & (scale <= self.max_scale)
        quiet = inside & (state["step_counter"] < self.growth_interval - 1)
        if self.recovery_interval is None:
            return quiet
        return quiet & (scale >= ONE) & (state["recover_to"] == 0.0)

    def update(self, state: State, finite: Any) -> State:
        """Return the state after a step; see the class for the rule."""
        scale, state = self.read(state)
        if self.hysteresis > 1:
            # What was saved by a schedule with another hysteresis must not be worth more here.
            state["hysteresis_left"] = ops.clip(state["hysteresis_left"], 0, self.hysteresis)
        if isinstance(finite, bool):
            return self._after_good(state, scale) if finite else self._after_bad(state, scale)
        good, bad = self._after_good(state, scale), self._after_bad(state, scale)
        return {key: ops.where(finite, good[key], bad[key]) for key in good}

    def _after_good(self, state: State, scale: Any) -> State:
        good_steps = state["step_counter"] + 1
        none = ops.zeros_like(good_steps)
        after: State = {}
        interval: Any = self.growth_interval
        if self.recovery_interval is not None:
            target = self._recovering_to(state, scale)
            recovering, below = target > scale, scale < ONE
            # As tensors: two Python numbers would not have the counter's dtype.
            quick, slow = (
                ops.full_like(good_steps, n)
                for n in (min(self.recovery_interval, self.growth_interval), self.growth_interval)
            )
            hurried = ops.where(below, none + 1, quick)
            # Where a growth has just overflowed below 1, the target is the scale itself.
            patient = ops.where(ops.logical_and(below, target == 0.0), quick, slow)
            interval = ops.where(recovering, hurried, patient)
        grow = good_steps >= interval
        # Growing may overflow float32 at a ceiling near its maximum: the minimum mends that.
        higher = ops.minimum(scale * self.growth_factor, self.max_scale)
        if self.recovery_interval is not None:
            higher = ops.where(recovering, ops.minimum(higher, target), higher)
        after["scale"] = ops.where(grow, higher, scale)
        after["step_counter"] = ops.where(grow, none, good_steps)
        if self.hysteresis > 1:
            left = state["hysteresis_left"]
            full = ops.full_like(left, self.hysteresis)
            after["hysteresis_left"] = (
                full if self.consecutive_hysteresis else ops.where(grow, full, left)
            )
        if self.tolerance > 0:
            after["steps_since_change"] = ops.where(grow, none, state["steps_since_change"] + 1)
            after["overflows_since_change"] = ops.where(grow, none, state["overflows_since_change"])
        if self.recovery_interval is not None:
            holds = ops.logical_and(below, ops.logical_not(grow))
            kept = ops.logical_or(after["scale"] < target, holds)
            after["recover_to"] = ops.where(kept, target, 0.0)
        return after

    def _after_bad(self, state: State, scale: Any) -> State:
        none = ops.zeros_like(state["step_counter"])
        after: State = {"step_counter": none}
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
            after["steps_since_change"] = ops.where(back_off, none, steps)
            after["overflows_since_change"] = ops.where(back_off, none, overflows)
        lower = ops.maximum(scale * self.backoff_factor, self.min_scale)
        after["scale"] = either(back_off, lower, scale)
        if self.recovery_interval is not None:
            before = state["recover_to"]
            level = level_before(scale, lower, state["step_counter"], before)
            after["recover_to"] = ops.where(before < 0, before, -level)
        return after

    def _recovering_to(self, state: State, scale: Any) -> Any:
        """Return the scale that a recovery ends at; 0 if there is none.

        During a run of overflows the scale before it is stored as a negative number: only the good
        step after it can tell how deep the slump was. One that equals the scale is kept below 1,
        but not where the overflows were tolerated: then the scale is what it was.
        """
        stored = state["recover_to"]
        kept = ops.logical_or(
            is_slump(scale, -stored), ops.logical_and(scale < ONE, scale == -stored)
        )
        # Once one has lowered the scale, so does each that follows in the run.
        if self.hysteresis > 1:
            kept = ops.logical_and(kept, state["hysteresis_left"] <= 0)
        if self.tolerance > 0:
            kept = ops.logical_and(kept, state["steps_since_change"] == 0)
        target = ops.where(stored < 0, ops.where(kept, -stored, 0.0), stored)
        # A target beyond the ceiling, of a schedule with a higher one, would never be reached.
        return ops.minimum(target, self.max_scale)
