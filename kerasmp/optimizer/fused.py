"""Updates in one kernel for each variable, where the framework has one that is Keras's."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.keras_internals import decays, moments
from kerasmp.backend.nested import has_replaced_methods
from kerasmp.backend.protocol import Weight
from kerasmp.loss_scale import FixedLossScale
from kerasmp.optimizer.unscaled_gradients import divided

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
    """The update of an optimizer, of exactly a class of Keras's own, with its own methods.

    Attributes:
        inner: The optimizer.
        takes: For each variable of a step, whether it has such an update; Keras's own takes others.
    """

    inner: Any
    takes: Sequence[bool] = ()

    @classmethod
    def of(cls, inner: Any, schedule: LossScale) -> Fused | None:
        """Return that of an optimizer, or None if it has no such update.

        Args:
            inner: The optimizer; what it is told to do may change until its first step.
            schedule: That of the scale.
        """
        known = type(inner) in _classes() and _largest_of(schedule) <= LARGEST_SCALE
        suits = backend.current().FUSED and known and not has_replaced_methods(inner)
        return cls(inner) if suits else None

    def suited(
        self, grads: Sequence[Any], variables: Sequence[Any], dtypes: Sequence[str]
    ) -> Fused | None:
        """Return the update for these, or None if the optimizer would do more to them, or other.

        Args:
            grads: The gradients, one or None for each variable.
            variables: The variables.
            dtypes: Theirs.
        """
        inner = self.inner
        framework = backend.current()
        if (
            not framework.is_one_replica()
            or (inner.use_ema or inner.gradient_accumulation_steps or inner.clipnorm)
            or (inner.clipvalue or getattr(inner, "amsgrad", False))
            or not all(isinstance(v, keras.Variable) for v in variables)
        ):
            return None
        # Where Keras would do to a variable nothing but what the update does.
        suits = framework.fits_fused_kernels(grads, variables)
        takes = [
            fits
            and dtype == "float32"
            and v.constraint is None
            and not getattr(v, "overwrite_with_gradient", False)
            for v, dtype, fits in zip(variables, dtypes, suits, strict=True)
        ]
        # What Keras is given goes by no norm of others, and is not all None.
        apart = not inner.global_clipnorm and all(g is not None for g in grads)
        if all(takes) or (any(takes) and apart and framework.updates_apart()):
            return Fused(inner, takes)
        return None

    def __call__(self, step: Step, applied: Any) -> None:
        """Update the variables; see `Backend.run_step` for `applied`."""
        inner, framework = self.inner, backend.current()
        rate = ops.cast(inner.learning_rate, "float32")
        divisor = step.scale
        if inner.global_clipnorm:
            norm = ops.sqrt(framework.sum_of_squares(step.grads, divisor))
            divisor = divisor * ops.maximum(norm / inner.global_clipnorm, 1.0)
        decay = rate * inner.weight_decay if inner.weight_decay else None
        rows = list(zip(step.variables, step.grads, moments(inner, step.variables), strict=True))
        weights = [
            Weight(*row, decay if decay is not None and decays(inner, row[0]) else None)
            for row, takes in zip(rows, self.takes, strict=True)
            if takes
        ]
        if isinstance(inner, keras.optimizers.SGD):
            framework.sgd(weights, rate / divisor, inner.momentum, applied, nesterov=inner.nesterov)
        else:
            number = ops.cast(inner.iterations + 1, "float32")
            powers = [
                ops.power(ops.cast(b, "float32"), number) for b in (inner.beta_1, inner.beta_2)
            ]
            alpha = rate * ops.sqrt(1 - powers[1]) / (1 - powers[0])
            framework.adam(
                weights, divisor, alpha, (inner.beta_1, inner.beta_2), inner.epsilon, applied
            )
        if len(weights) < len(rows):
            others = [row for row, takes in zip(rows, self.takes, strict=True) if not takes]
            updates = [g if step.unscaled else divided(g, v, step.scale) for v, g, _ in others]
            inner.apply(updates, [v for v, _, _ in others])  # and counts the step
            return
        inner.iterations.assign_add(
            1 if applied is None else ops.cast(applied, inner.iterations.dtype)
        )
