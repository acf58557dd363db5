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


def place() -> tuple[Any, Any]:
    """Return what tells this replica and this trace from others; a trace is None in eager code."""
    return None, None


def bakes_in(scale: Any) -> bool:  # noqa: ARG001 - one signature for all backends
    """Return whether a traced function that reads `scale` here keeps this value for all calls."""
    return False  # eager code reads it in each step


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


def start_as(variable: Any, other: Any) -> None:
    """Give a new variable the value of another one."""
    with torch.no_grad():
        variable.assign(other.value)


def sync(model: Any) -> None:
    """Make the variables current: torch's always are."""


def train_step(model: Any, parent: Callable[..., Any], data: Any) -> Any:
    """Run the parent's train step and undo its traces if the optimizer skipped."""
    guarded = [*model.non_trainable_variables, *model.metrics_variables]
    before = [v.value.detach().clone() for v in guarded]
    # Dropout without a seed draws from torch's own generators, not from a Keras variable.
    generators = _generators()
    states = [generator.get_state() for generator in generators]
    logs = parent(data)
    if not model.optimizer.last_step_skipped:
        return logs
    with torch.no_grad():
        for variable, value in zip(guarded, before, strict=True):
            variable.assign(value)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return model.get_metrics_result()


def _generators() -> list[Any]:
    # The default generators of devices that are in use; asking for others would initialise them.
    used = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *used]
