"""What only JAX needs: an eager step made of the pure one, and a train step over explicit state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import jax
import keras
from jax import numpy as jnp

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # where it was in older JAX
    from jax.core import get_opaque_trace_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# scale_loss runs inside the function that is differentiated, and what it sees stays there.
LOSS_MEETS_APPLY = False


def dense_values(gradient: Any) -> Any:
    """Return the numbers of a gradient."""
    return gradient


def with_values(gradient: Any, values: Any) -> Any:  # noqa: ARG001 - one signature for all backends
    """Return `gradient` with other numbers at the same places."""
    return values


def place() -> tuple[Any, Any]:
    """Return what tells this replica and this trace from others; a trace is None in eager code."""
    return None, get_opaque_trace_state(convention="flax")


def agreed(grads: Sequence[Any], variables: Sequence[Any], loss_finite: Any) -> tuple[Any, Any]:  # noqa: ARG001
    """Return the gradients, and whether the loss was finite, as all replicas see them.

    On JAX the arrays of a step are global: every device sees the same ones already.
    """
    return grads, loss_finite


def bakes_in(scale: Any) -> bool:
    """Return whether a traced function that reads `scale` here keeps this value for all calls."""
    # Under jit alone does JAX trace what depends on no argument; grad and vmap just compute it.
    return not isinstance(scale, jax.core.Tracer) and isinstance(jnp.add(scale, 0), jax.core.Tracer)


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return `step`, compiled at its first call."""
    return cast("Callable[..., Any]", jax.jit(step))


def start_as(variable: Any, other: Any) -> None:
    """Give a variable that holds nothing but zeros the value of another one."""
    if not jnp.any(variable.value):
        # A copy: a train step donates both buffers, and must not donate one twice.
        variable.assign(jnp.copy(other.value))


def sync(model: Any) -> None:
    """Make the variables current: during `fit` on JAX their values travel outside them."""
    model.jax_state_sync()


def train_step(
    model: Any, parent: Callable[..., Any], state: Sequence[Any], data: Any
) -> tuple[Any, Sequence[Any]]:
    """Run the parent's train step and undo its traces if the optimizer skipped.

    Args:
        model: The model, whose optimizer is ours.
        parent: The parent's pure `train_step(state, data)`.
        state: Trainable, non-trainable, optimizer and metrics variables, as Keras passes them.
        data: The batch.

    Returns:
        The logs and the new state.
    """
    _, before, before_optimizer, metrics_before = state
    logs, (trainable, after, optimizer, metrics_after) = parent(state, data)
    with keras.StatelessScope(
        state_mapping=list(zip(model.optimizer.variables, optimizer, strict=True))
    ):
        skipped = model.optimizer.skipped_last()
    loss = next((m for m in model.metrics if m.name == "loss"), None)
    if isinstance(loss, keras.metrics.Mean):
        # Finite before, for skipped steps leave no trace in it: what it is now, the loss was.
        total = metrics_after[_position(loss.total, model.metrics_variables)]
        optimizer = model.optimizer.with_known_loss(
            before_optimizer, optimizer, jnp.isfinite(total)
        )
    after = _choose(skipped, before, after)
    metrics = _choose(skipped, metrics_before, metrics_after)
    with keras.StatelessScope(
        state_mapping=list(zip(model.metrics_variables, metrics, strict=True))
    ):
        logs = model.get_metrics_result()
    return logs, (trainable, after, optimizer, metrics)


def _position(variable: Any, variables: Sequence[Any]) -> int:
    return next(i for i, candidate in enumerate(variables) if candidate is variable)


def _choose(skipped: Any, before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    # What the step passed through untouched, a frozen backbone say, needs no choice and no kernel.
    return [
        new if new is old else jax.tree.map(lambda o, n: jnp.where(skipped, o, n), old, new)
        for old, new in zip(before, after, strict=True)
    ]
