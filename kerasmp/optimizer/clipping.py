"""Clipping by a norm before the gradients are unscaled, where Keras would do it after."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp import backend
from kerasmp.backend.nested import is_stock, optimizer_chain, standing_in
from kerasmp.optimizer.unscaled_gradients import divided, takes_gradient_as_value

if TYPE_CHECKING:
    from kerasmp.optimizer.step import Step


def divisors(inner: Any, step: Step) -> list[Any] | None:
    """Return what clipping divides each gradient by, or None where it is left to Keras.

    Keras makes a norm of the unscaled gradients and then uses them again, for which a framework may
    keep all of them in memory.

    Args:
        inner: The inner optimizer.
        step: The step; a norm that is not finite gives divisors that mean nothing.

    Returns:
        A scalar, at least 1, for each gradient; None for what is no gradient or not clipped.
    """
    framework = backend.current()
    norm = inner.clipnorm or inner.global_clipnorm or 0
    if norm <= 0 or not framework.KEEPS_QUOTIENTS:
        return None
    if (
        inner.gradient_accumulation_steps
        or optimizer_chain(inner) != [inner]
        or not is_stock(inner)
    ):
        return None  # which clip later, or each by itself, or may clip otherwise
    indices = [
        i
        for i, (g, v) in enumerate(zip(step.grads, step.variables, strict=True))
        if g is not None and not takes_gradient_as_value(v)
    ]
    if not indices:
        return None
    norms = framework.norms([step.grads[i] for i in indices], step.scale)
    if not inner.clipnorm:
        norms = ops.full_like(norms, ops.sqrt(ops.sum(ops.square(norms))))
    found: list[Any] = [None] * len(step.grads)
    for i, each in zip(indices, ops.unstack(ops.maximum(norms / norm, 1)), strict=True):
        found[i] = each
    return found


def clipped(inner: Any, step: Step, by: list[Any]) -> tuple[Any, Step]:
    """Return an optimizer that clips by no norm, and the step with gradients that are clipped.

    Args:
        inner: The inner optimizer, which is left as it is.
        step: The step.
        by: What `divisors` returned.
    """
    grads = [
        g if each is None else divided(g, v, each)
        for g, v, each in zip(step.grads, step.variables, by, strict=True)
    ]
    unclipping = standing_in(inner, {id(inner): {"clipnorm": None, "global_clipnorm": None}})
    return unclipping, dataclasses.replace(step, grads=grads)
