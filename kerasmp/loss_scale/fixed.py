"""Schedules whose scale does not move: a constant scale, and no scaling."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale, State, either


def _with_same_scale(schedule: LossScale, state: State, finite: Any) -> State:
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

    Use it if you know how large the gradients of a model are. Steps that overflow are still skipped
    and counted. You can still assign another `loss_scale` to the optimizer, of 1 or more (or down
    to `scale`, if that is less than 1).

    Args:
        scale: A positive float32 number, default 32768. Powers of two scale without rounding.

    Raises:
        LossScaleError: If `scale` is not such a number.

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
        """The smallest scale that can be assigned: 1, or `scale` if that is less."""
        return min(self.scale, 1.0)

    @property
    def max_scale(self) -> float:  # type: ignore[override]
        """The largest float32 number."""
        return validation.LARGEST_SCALE

    def bounded(self, scale: Any) -> Any:
        """Return `scale` within the bounds, or the scale of this schedule if it is infinite.

        The largest float32 number makes every gradient overflow, and would never come down.
        """
        inside = super().bounded(scale)
        return ops.where(inside < self.max_scale, inside, self.scale)

    def only_counts(self, state: State) -> Any:
        """Return whether the scale is inside the bounds."""
        scale = state["scale"]
        return (scale >= self.min_scale) & (scale < self.max_scale)

    def update(self, state: State, finite: Any) -> State:
        """Return the state after a step: the same scale, brought within the bounds."""
        return _with_same_scale(self, state, finite)


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True)
class NoLossScale(LossScale):
    """A scale of 1: nothing is scaled, but gradients are checked and bad steps are skipped.

    It is for bfloat16 and float32. They need no scaling, but their gradients can become inf or NaN.

    Example:

    >>> NoLossScale().init()["scale"]
    1.0
    """

    @property
    def initial_scale(self) -> float:  # type: ignore[override]
        """Always 1."""
        return 1.0

    min_scale = initial_scale
    max_scale = initial_scale

    def only_counts(self, state: State) -> Any:
        """Return whether the scale is 1."""
        return state["scale"] == 1.0

    def update(self, state: State, finite: Any) -> State:
        """Return the state after a step, with the scale 1."""
        return _with_same_scale(self, state, finite)
