"""Scales that do not move: a constant, and none at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale, State, either


def _hold(schedule: LossScale, state: State, finite: Any) -> State:
    scale, state = schedule.read(state)
    counter = state["step_counter"]
    return {
        "scale": scale,
        "step_counter": either(finite, counter + 1, ops.zeros_like(counter)),
    }


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class FixedLossScale(LossScale):
    """A scale that never moves by itself.

    Right when the size of a model's gradients is known; steps that overflow are still skipped
    and counted. The optimizer's `loss_scale` can still be set by hand, to 1 or more (or down to
    `scale` where that is less than 1).

    Args:
        scale: Positive float32 number, default 32768. Powers of two scale without rounding.

    Raises:
        LossScaleError: If `scale` is zero, negative, infinite, NaN or no number.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.2 (constant scaling factors from 8 to 32K).

    Example:

    >>> FixedLossScale(1024).init()["scale"]
    1024.0
    """

    scale: float = 2.0**15

    def __post_init__(self) -> None:
        validation.settings(self, FixedLossScale)

    @property
    def initial_scale(self) -> float:  # type: ignore[override]  # not settable: frozen
        """The scale."""
        return self.scale

    @property
    def min_scale(self) -> float:  # type: ignore[override]
        """1, or `scale` where that is less: what the scale may be set to by hand."""
        return min(self.scale, 1.0)

    @property
    def max_scale(self) -> float:  # type: ignore[override]
        """The largest float32."""
        return validation.LARGEST_SCALE

    def bounded(self, scale: Any) -> Any:
        """Return `scale` within the bounds; where it is infinite, the scale of this schedule.

        From the largest float32, at which every gradient overflows, nothing would bring it down.
        """
        inside = super().bounded(scale)
        return ops.where(inside < self.max_scale, inside, self.scale)

    def only_counts(self, state: State) -> Any:
        """Return whether the scale is inside the bounds."""
        scale = state["scale"]
        return (scale >= self.min_scale) & (scale < self.max_scale)

    def update(self, state: State, finite: Any) -> State:
        """Return the same scale, brought inside the bounds where it was not."""
        return _hold(self, state, finite)


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class NoLossScale(LossScale):
    """The scale is 1: gradients are checked and bad steps skipped, nothing is scaled.

    Meant for bfloat16 and float32, whose range needs no scaling but whose steps can still go bad.

    Example:

    >>> NoLossScale().init()["scale"]
    1.0
    """

    @property
    def initial_scale(self) -> float:  # type: ignore[override]
        """1."""
        return 1.0

    min_scale = initial_scale
    max_scale = initial_scale

    def only_counts(self, state: State) -> Any:
        """Return whether the scale is 1."""
        return state["scale"] == 1.0

    def update(self, state: State, finite: Any) -> State:
        """Return `state` with the scale 1."""
        return _hold(self, state, finite)
