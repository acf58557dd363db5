"""The schedule that follows statistics of the largest gradient."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import keras
from keras import ops

from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale, State, either
from kerasmp.loss_scale.slump import DEFAULT_MIN_SCALE, SHORT_INTERVAL

# The exponent at which float16 overflows.
LARGEST_EXPONENT = 16.0
_MOMENTS = ("mean", "mean_weight", "slow_mean", "square", "slow_weight")


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class LogMaxLossScale(LossScale):
    """The highest scale at which an overflow is unlikely, by the gradients seen so far.

    The logarithm (base 2) of the largest gradient is taken as normally distributed. Its running
    mean m and standard deviation s give the scale 2**(16 - (m + deviations * s)), rounded down to a
    power of two so that scaling stays exact.

    Of an overflow only a bound is known, so it counts as a maximum of 2**16 / scale. It does not
    count if the step before overflowed too, so that a run of bad data counts once, or while the
    scale is still rising to its value. An overflow at least halves the scale, and a good step at
    most doubles it.

    If all gradients of a step are zero, the scale stays. But below 1 the scale itself may be what
    made them zero. There such a step doubles it as far as the maxima seen before allow, and above
    that every twentieth such step does. Only an overflow takes the scale below 1, or lower there.

    Args:
        initial_scale: The first scale, default 32768.
        deviations: How many standard deviations above the mean must still fit, default 3.09: one
            overflow in a thousand steps.
        mean_decay: The decay of the running mean, between 0 and 1, default 0.99.
        variance_decay: The decay of the running variance, between 0 and 1, default 0.999.
        min_scale: The smallest scale, default 2**-14.
        max_scale: The largest scale, default 2**24.

    Raises:
        LossScaleError: If a value is outside its range, or the bounds do not enclose
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
    min_scale: float = DEFAULT_MIN_SCALE
    max_scale: float = 2.0**24

    def __post_init__(self) -> None:
        validation.settings(self, LogMaxLossScale)

    def init(self) -> State:
        """Return the state before the first step, with the running moments and their weights."""
        return {**super().init(), **dict.fromkeys(_MOMENTS, 0.0)}

    def update(self, state: State, finite: Any, gradient_max: Any = 0.0) -> State:
        """Return the state after a step. The class describes the rule.

        Args:
            state: A dict with the keys of `init`.
            finite: Whether every gradient was finite, as a scalar.
            gradient_max: The largest absolute value of the unscaled gradients, as a scalar. The
                default is 0, which means that it is not known.
        """
        scale, state = self.read(state)
        largest = ops.convert_to_tensor(gradient_max, dtype="float32")
        at_least = LARGEST_EXPONENT - _log2(scale)
        exponent = either(finite, _log2(ops.where(largest > 0, largest, 1.0)), at_least)

        # Running moments never forget an inf or NaN that was loaded, so all of them start again.
        valid = ops.isfinite(sum(state[key] for key in _MOMENTS))
        state |= {key: ops.where(valid, state[key], 0.0) for key in _MOMENTS}
        # While the scale is below what the moments allow, an overflow is due to bad data. Counted
        # as a maximum it would be far too large.
        allowed = self._allowed_scale(state)
        counts = ops.logical_and(state["step_counter"] > 0, allowed <= scale)
        known = either(finite, largest > 0, counts)
        fast, slow = self.mean_decay, self.variance_decay
        moments = {
            "mean": _running(state["mean"], exponent, fast),
            "mean_weight": _running(state["mean_weight"], 1.0, fast),
            "slow_mean": _running(state["slow_mean"], exponent, slow),
            "square": _running(state["square"], exponent * exponent, slow),
            "slow_weight": _running(state["slow_weight"], 1.0, slow),
        }
        proposed = self._allowed_scale(moments)
        lower = ops.maximum(scale * 0.5, self.min_scale)
        higher = ops.minimum(scale * 2.0, self.max_scale)
        # Small maxima after large ones have a large deviation, which would lower the scale until
        # it flushes them to zero.
        least = ops.minimum(scale, 1.0)
        steps = state["step_counter"] + 1
        zero = ops.zeros_like(steps)
        # A scale that flushes all gradients to zero is too low, but no gradient ever shows it.
        nothing_seen = ops.logical_not(state["mean_weight"] > 0)
        due = ops.logical_or(
            ops.logical_or(nothing_seen, allowed > scale), steps % SHORT_INTERVAL == 0
        )
        raise_it = ops.logical_and(scale < 1, due)
        restart = ops.logical_and(ops.logical_not(known), raise_it)
        return {
            "scale": ops.where(
                known,
                ops.minimum(
                    either(finite, ops.maximum(proposed, least), proposed),
                    either(finite, higher, lower),
                ),
                either(finite, ops.where(raise_it, higher, scale), lower),
            ),
            "step_counter": either(finite, ops.where(restart, zero, steps), zero),
            **{key: ops.where(known, value, state[key]) for key, value in moments.items()},
        }

    def _allowed_scale(self, moments: State) -> Any:
        """Return the scale that these moments allow, or `min_scale` if they hold nothing yet."""
        slow_mean = moments["slow_mean"] / moments["slow_weight"]
        variance = moments["square"] / moments["slow_weight"] - slow_mean * slow_mean
        mean = moments["mean"] / moments["mean_weight"]
        spread = ops.sqrt(ops.maximum(variance, 0.0))
        exponent = LARGEST_EXPONENT - (mean + self.deviations * spread)
        return self.bounded(2.0 ** ops.floor(exponent))


def _log2(value: Any) -> Any:
    return ops.log(value) / ops.log(ops.full_like(value, 2.0))


def _running(average: Any, value: Any, decay: float) -> Any:
    return decay * average + (1.0 - decay) * value
