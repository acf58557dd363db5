"""What only torch needs: variables that change in place, and an eager train step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Update = Callable[[Sequence[Any], Sequence[Any]], None]
Advance = Callable[[bool, Any], None]


def dense_values(gradient: Any) -> Any:
    """Return the numbers of a gradient."""
    return gradient


def with_values(gradient: Any, values: Any) -> Any:  # noqa: ARG001 - one signature for all backends
    """Return `gradient` with other numbers at the same places."""
    return values


def run_step(
    bad: Any, grads: Sequence[Any], variables: Sequence[Any], update: Update, advance: Advance
) -> None:
    """Update the variables if all gradients are finite, else only move the scale.

    Eager code branches on the host: one flag is read from the device each step, as PyTorch's own
    GradScaler does.
    """
    with torch.no_grad():
        finite = not bool((bad > 0).any())
        if finite:
            update(grads, variables)
        advance(finite, bad)


def train_step(model: Any, parent: Callable[..., Any], data: Any) -> Any:
    """Run the parent's train step and undo its traces if the optimizer skipped."""
    guarded = [*model.non_trainable_variables, *model.metrics_variables]
    before = [v.value.detach().clone() for v in guarded]
    logs = parent(data)
    if not model.optimizer.last_step_skipped:
        return logs
    with torch.no_grad():
        for variable, value in zip(guarded, before, strict=True):
            variable.assign(value)
    return model.get_metrics_result()
