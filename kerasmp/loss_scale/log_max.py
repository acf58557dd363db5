"""The scale that follows statistics of the gradients' largest value."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import keras
from keras import ops

from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale, State, either
from kerasmp.loss_scale.slump import FLOOR, ONE, QUICK

# The exponent at which float16 overflows.
LARGEST_EXPONENT = 16.0
_MOMENTS = ("mean", "mean_weight", "slow_mean", "square", "slow_weight")


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class LogMaxLossScale(LossScale):
    """As high as keeps an overflow unlikely, by the gradients seen so far.

    The logarithm (base 2) of the largest gradient is taken as normally distributed. Its running
    mean m and standard deviation s give the scale 2**(16 - (m + deviations * s)), rounded down to a
    power of two so that scaling stays exact. An overflow, of which only a bound is known, counts as
    a maximum of 2**16 / scale; not so if the step before it overflowed too, or on the way up, so
    that a run of bad data counts once. It halves the scale at least. A good step doubles it at
    most. A step whose gradients are all zero says nothing and changes nothing, but below 1 the
    scale may be what made them zero: there such a step doubles it, up to what the maxima seen
    before allow; above that each twentieth does. Only an overflow takes it below 1, and lower.

    Args:
        initial_scale: The first scale, default 32768.
        deviations: Standard deviations kept free, default 3.09: one overflow in a thousand steps.
        mean_decay: Of the running mean, between 0 and 1, default 0.99.
        variance_decay: Of the running variance, between 0 and 1, default 0.999.
        min_scale: The floor, default 2**-14.
        max_scale: The ceiling, default 2**24.

    Raises:
        LossScaleError: For any value outside these ranges, or bounds that do not enclose
            `initial_scale`.

    References:
        Kuchaiev et al., OpenSeq2Seq, 2018, https://arxiv.org/abs/1805.10387 ("LogMax").

    Example:

    >>> schedule = LogMaxLossScale()
    >>> float(schedule.update(schedule.init(), finite=True, gradient_max=4.0)["scale"])
    16384.0
    """

    measures: ClassVar[tuple[str, ...]] = ("gradient_max",)

    initial_scale: float = 2.0**15
    deviations: float = 3.09
    mean_decay: float = 0.99
    variance_decay: float = 0.999
    min_scale: float = FLOOR
    max_scale: float = 2.0**24

    def __post_init__(self) -> None:
        validation.settings(self, LogMaxLossScale)

    def init(self) -> State:
        """Return the state before the first step: running moments, and the weight they hold."""
        return {**super().init(), **dict.fromkeys(_MOMENTS, 0.0)}

    def update(self, state: State, finite: Any, gradient_max: Any = 0.0) -> State:
        """Return the state after a step; see the class for the rule.

        Args:
            state: The dict of `init`.
            finite: Scalar bool, whether every gradient was finite.
            gradient_max: Scalar, the largest absolute value of the unscaled gradients; 0, the
                default, if it is not known.
        """
        scale, state = self.read(state)
        largest = ops.convert_to_tensor(gradient_max, dtype="float32")
        at_least = LARGEST_EXPONENT - _log2(scale)
        exponent = either(finite, _log2(ops.where(largest > 0, largest, 1.0)), at_least)

        fast, slow = self.mean_decay, self.variance_decay
        # Running moments never forget an inf or NaN that was loaded: they begin anew then.
        sound = ops.isfinite(sum(state[key] for key in _MOMENTS))
        state |= {key: ops.where(sound, state[key], 0.0) for key in _MOMENTS}
        # On the way up to what the moments allow, an overflow tells of bad data and not of the size
        # of gradients: as a maximum it would be far too large.
        allowed = self._proposed(state)
        there = allowed <= scale
        counts = ops.logical_and(state["step_counter"] > 0, there)
        known = either(finite, largest > 0, counts)
        seen = {
            "mean": _moved(state["mean"], exponent, fast),
            "mean_weight": _moved(state["mean_weight"], 1.0, fast),
            "slow_mean": _moved(state["slow_mean"], exponent, slow),
            "square": _moved(state["square"], exponent * exponent, slow),
            "slow_weight": _moved(state["slow_weight"], 1.0, slow),
        }
        proposed = self._proposed(seen)
        lower = ops.maximum(scale * 0.5, self.min_scale)
        higher = ops.minimum(scale * 2.0, self.max_scale)
        # Small maxima after large ones have a wide spread: it must not flush them to zero.
        least = ops.minimum(scale, ONE)
        count = state["step_counter"] + 1
        none = ops.zeros_like(count)
        # A scale that flushes all gradients to zero would never learn that it is too low.
        unseen = ops.logical_not(state["mean_weight"] > 0)
        due = ops.logical_or(ops.logical_or(unseen, allowed > scale), count % QUICK == 0)
        blind = ops.logical_and(scale < ONE, due)
        moved = ops.logical_and(ops.logical_not(known), blind)
        return {
            "scale": ops.where(
                known,
                ops.minimum(
                    either(finite, ops.maximum(proposed, least), proposed),
                    either(finite, higher, lower),
                ),
                either(finite, ops.where(blind, higher, scale), lower),
            ),
            "step_counter": either(finite, ops.where(moved, none, count), none),
            **{key: ops.where(known, value, state[key]) for key, value in seen.items()},
        }

    def _proposed(self, seen: State) -> Any:
        """Return the scale that these moments allow; the floor where there are none."""
        slow_mean = seen["slow_mean"] / seen["slow_weight"]
        variance = seen["square"] / seen["slow_weight"] - slow_mean * slow_mean
        mean = seen["mean"] / seen["mean_weight"]
        spread = ops.sqrt(ops.maximum(variance, 0.0))
        exponent = LARGEST_EXPONENT - (mean + self.deviations * spread)
        return self.bounded(2.0 ** ops.floor(exponent))


def _log2(value: Any) -> Any:
    return ops.log(value) / ops.log(ops.full_like(value, 2.0))


def _moved(average: Any, value: Any, decay: float) -> Any:
    return decay * average + (1.0 - decay) * value
