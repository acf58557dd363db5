"""Updates in one kernel for each variable, where the framework has one that is Keras's."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.base import Weight, wide_dtype
from kerasmp.backend.keras_private import decays, moments
from kerasmp.loss_scale import FixedLossScale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.loss_scale import LossScale
    from kerasmp.optimizer.step import Step

# A rate that is divided by a larger one could be flushed to zero.
LARGEST_SCALE = 2.0**64


@functools.cache
def _classes() -> dict[type, str]:
    """Return the classes that there are such updates for; torch has its own of each."""
    return {type(keras.optimizers.get(name)): name for name in ("adam", "adamw", "sgd")}


def _largest_of(schedule: LossScale) -> float:
    """Return the largest scale that a schedule comes to by itself."""
    fixed = isinstance(schedule, FixedLossScale)
    return schedule.initial_scale if fixed else schedule.max_scale


@dataclasses.dataclass(frozen=True)
class Fused:
    """The update of an optimizer, of exactly a class of Keras's own.

    Attributes:
        inner: The optimizer.
    """

    inner: Any

    @classmethod
    def of(cls, inner: Any, schedule: LossScale) -> Fused | None:
        """Return that of an optimizer, or None if it has no such update.

        Args:
            inner: The optimizer; what it is told to do may change until its first step.
            schedule: That of the scale.
        """
        known = type(inner) in _classes() and _largest_of(schedule) <= LARGEST_SCALE
        return cls(inner) if backend.current().FUSED and known else None

    def suits(self, grads: Sequence[Any], variables: Sequence[Any]) -> bool:
        """Return whether the optimizer would do to these nothing but what the update does.

        Args:
            grads: The gradients, one or None for each variable.
            variables: The variables.
        """
        inner = self.inner
        room = backend.current()
        return (
            room.is_one_replica()
            and not (inner.use_ema or inner.gradient_accumulation_steps or inner.clipnorm)
            and not (inner.clipvalue or getattr(inner, "amsgrad", False))
            # A method that was put into this one object.
            and not any(callable(getattr(type(inner), name, None)) for name in vars(inner))
            and all(
                isinstance(v, keras.Variable)
                and keras.backend.standardize_dtype(v.dtype) == "float32"
                and v.constraint is None
                and not getattr(v, "overwrite_with_gradient", False)
                for v in variables
            )
            and all(
                room.suits_kernels(g, v) and wide_dtype(g) == "float32"
                for g, v in zip(grads, variables, strict=True)
            )
        )

    def __call__(self, step: Step, applied: Any) -> None:
        """Update the variables; see `Backend.run_step` for `applied`."""
        inner, room = self.inner, backend.current()
        rate = ops.cast(inner.learning_rate, "float32")
        divisor = step.scale
        if inner.global_clipnorm:
            norm = ops.sqrt(room.squares(step.grads, divisor))
            divisor = divisor * ops.maximum(norm / inner.global_clipnorm, 1.0)
        decay = rate * inner.weight_decay if inner.weight_decay else None
        weights = [
            Weight(v, g, moments(inner, v), decay if decays(inner, v) else None)
            for g, v in zip(step.grads, step.variables, strict=True)
        ]
        if isinstance(inner, keras.optimizers.SGD):
            room.sgd(weights, rate / divisor, inner.momentum, applied, nesterov=inner.nesterov)
        else:
            number = ops.cast(inner.iterations + 1, "float32")
            powers = [
                ops.power(ops.cast(b, "float32"), number) for b in (inner.beta_1, inner.beta_2)
            ]
            alpha = rate * ops.sqrt(1 - powers[1]) / (1 - powers[0])
            room.adam(weights, divisor, alpha, (inner.beta_1, inner.beta_2), inner.epsilon, applied)
        inner.iterations.assign_add(
            1 if applied is None else ops.cast(applied, inner.iterations.dtype)
        )
