"""Clipping by a norm before the gradients are unscaled, where Keras would do it after."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp import backend
from kerasmp.backend.nested import copy_with_settings, is_stock, optimizer_chain
from kerasmp.optimizer.step import divide_gradient, takes_gradient_as_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.optimizer.step import Step


def clip_divisors(inner: Any, step: Step) -> list[Any] | None:
    """Return what clipping divides each gradient by, or None if Keras does the clipping.

    Keras computes a norm from the unscaled gradients and then uses these again, so a framework may
    keep all of them in memory.

    Args:
        inner: The inner optimizer.
        step: The step. If a norm is not finite, the divisors mean nothing.

    Returns:
        A scalar of at least 1 for each gradient; None for a gradient that is None or is the new
        value of its variable.
    """
    framework = backend.current()
    norm = inner.clipnorm or inner.global_clipnorm or 0
    if norm <= 0 or not framework.MATERIALIZES_QUOTIENTS:
        return None
    if (
        inner.gradient_accumulation_steps
        or optimizer_chain(inner) != [inner]
        or not is_stock(inner)
    ):
        return None  # these clip later, or separately, or may clip in another way
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
    divisors: list[Any] = [None] * len(step.grads)
    for i, divisor in zip(indices, ops.unstack(ops.maximum(norms / norm, 1)), strict=True):
        divisors[i] = divisor
    return divisors


def clip(inner: Any, step: Step, divisors: Sequence[Any]) -> tuple[Any, Step]:
    """Clip the gradients of a step.

    Args:
        inner: The inner optimizer, which is not changed.
        step: The step.
        divisors: The result of `clip_divisors`.

    Returns:
        An optimizer that does not clip by a norm, and a step with the clipped gradients.
    """
    grads = [
        g if divisor is None else divide_gradient(g, v, divisor)
        for g, v, divisor in zip(step.grads, step.variables, divisors, strict=True)
    ]
    settings = {id(inner): {"clipnorm": None, "global_clipnorm": None}}
    return copy_with_settings(inner, settings), dataclasses.replace(step, grads=grads)
