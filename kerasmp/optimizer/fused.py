"""Updates in one kernel for each variable, where the framework has a kernel that matches Keras."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.nested import has_replaced_methods
from kerasmp.backend.optimizer_internals import applies_weight_decay, moments
from kerasmp.backend.tensors import Weight
from kerasmp.loss_scale import FixedLossScale
from kerasmp.optimizer.step import divide_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.loss_scale import LossScale
    from kerasmp.optimizer.step import Step

# The learning rate is divided by the scale. With a larger scale it could be flushed to zero.
LARGEST_SCALE = 2.0**64


@functools.cache
def _classes() -> dict[type, str]:
    """Return the classes that have fused updates. On torch, Keras has its own class of each."""
    return {type(keras.optimizers.get(name)): name for name in ("adam", "adamw", "sgd")}


def _largest_scale(schedule: LossScale) -> float:
    """Return the largest scale that a schedule can reach by itself."""
    fixed = isinstance(schedule, FixedLossScale)
    return schedule.initial_scale if fixed else schedule.max_scale


@dataclasses.dataclass(frozen=True)
class Fused:
    """The fused update of an optimizer whose class and methods are exactly those of Keras.

    Attributes:
        inner: The optimizer.
        fits: For each variable of a step, whether it has a fused update. Keras updates the others.
    """

    inner: Any
    fits: Sequence[bool] = ()

    @classmethod
    def of(cls, inner: Any, schedule: LossScale) -> Fused | None:
        """Return the fused update of an optimizer, or None if it has none.

        Args:
            inner: The optimizer. Its settings may change until its first step.
            schedule: The schedule of the loss scale.
        """
        known = type(inner) in _classes() and _largest_scale(schedule) <= LARGEST_SCALE
        fits = backend.current().HAS_FUSED_UPDATES and known and not has_replaced_methods(inner)
        return cls(inner) if fits else None

    def for_step(
        self, grads: Sequence[Any], variables: Sequence[Any], dtypes: Sequence[str]
    ) -> Fused | None:
        """Return the update for one step, or None if Keras would do more, or something else.

        Args:
            grads: One gradient, or None, for each variable.
            variables: The variables.
            dtypes: The dtypes of the variables.
        """
        inner = self.inner
        framework = backend.current()
        if (
            not framework.has_single_replica()
            or (inner.use_ema or inner.gradient_accumulation_steps or inner.clipnorm)
            or (inner.clipvalue or getattr(inner, "amsgrad", False))
            or not all(isinstance(v, keras.Variable) for v in variables)
        ):
            return None
        # A variable fits if the fused update does everything that Keras would do to it.
        kernel_fits = framework.fits_fused_kernels(grads, variables)
        fits = [
            fit
            and dtype == "float32"
            and v.constraint is None
            and not getattr(v, "overwrite_with_gradient", False)
            for v, dtype, fit in zip(variables, dtypes, kernel_fits, strict=True)
        ]
        # Keras can update the others separately if these need no norm of all gradients and have
        # gradients.
        separable = not inner.global_clipnorm and all(g is not None for g in grads)
        if all(fits) or (any(fits) and separable and framework.can_split_update()):
            return Fused(inner, fits)
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
            Weight(
                *row, decay if decay is not None and applies_weight_decay(inner, row[0]) else None
            )
            for row, fits in zip(rows, self.fits, strict=True)
            if fits
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
            others = [row for row, fits in zip(rows, self.fits, strict=True) if not fits]
            updates = [
                g if step.unscaled else divide_gradient(g, v, step.scale) for v, g, _ in others
            ]
            inner.apply(updates, [v for v, _, _ in others])  # this also counts the step
            return
        inner.iterations.assign_add(
            1 if applied is None else ops.cast(applied, inner.iterations.dtype)
        )
