"""The scale that follows the gradients: up after a quiet interval, down on overflow."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale, State, either


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
        min_scale: The floor, default 1.
        max_scale: The ceiling, default 2**24.

    Raises:
        LossScaleError: For any value outside these ranges, or bounds that do not enclose
            `initial_scale`.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740;
        the defaults are those of Keras, PyTorch's GradScaler and NVIDIA apex (ceiling 2**24).

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
    min_scale: float = 1.0
    max_scale: float = 2.0**24

    def __post_init__(self) -> None:
        checked = {
            "initial_scale": validation.scale("initial_scale", self.initial_scale),
            "min_scale": validation.scale("min_scale", self.min_scale),
            "max_scale": validation.scale("max_scale", self.max_scale),
            "growth_factor": validation.factor(
                "growth_factor", self.growth_factor, 1.0, math.inf, "The usual value is 2."
            ),
            "backoff_factor": validation.factor(
                "backoff_factor", self.backoff_factor, 0.0, 1.0, "The usual value is 0.5."
            ),
            "growth_interval": validation.count(
                "growth_interval", self.growth_interval, "The usual value is 2000."
            ),
            "hysteresis": validation.count(
                "hysteresis", self.hysteresis, "1 backs off at the first overflow."
            ),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not self.min_scale <= self.initial_scale <= self.max_scale:
            raise LossScaleError(
                "The bounds do not enclose the initial scale.",
                received=f"min_scale={self.min_scale:g}, initial_scale={self.initial_scale:g}, "
                f"max_scale={self.max_scale:g}",
                expected="min_scale <= initial_scale <= max_scale",
                fix="Move the initial scale, or the bound that it crosses.",
            )

    def init(self) -> State:
        """Return the state before the first step, with the overflows left before a backoff."""
        return {**super().init(), "hysteresis_left": self.hysteresis}

    def update(self, state: State, finite: Any) -> State:
        """Return the state after a step; see the class for the rule."""
        scale = self.bounded(state["scale"])
        good_steps = ops.convert_to_tensor(state["step_counter"]) + 1
        left = ops.convert_to_tensor(state["hysteresis_left"])
        left_if_bad = ops.maximum(left - 1, ops.zeros_like(left))

        grow = good_steps >= self.growth_interval
        # Growing may overflow float32 at a ceiling near its maximum: the minimum mends that.
        grown = ops.where(grow, ops.minimum(scale * self.growth_factor, self.max_scale), scale)
        backed_off = ops.maximum(scale * self.backoff_factor, self.min_scale)
        none = ops.zeros_like(good_steps)
        refilled = ops.where(grow, ops.full_like(left, self.hysteresis), left)
        return {
            "scale": either(finite, grown, ops.where(left_if_bad > 0, scale, backed_off)),
            "step_counter": either(finite, ops.where(grow, none, good_steps), none),
            "hysteresis_left": either(finite, refilled, left_if_bad),
        }
