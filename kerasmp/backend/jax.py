"""What only JAX needs: an eager step made of the pure one, and a train step over explicit state."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import jax
import keras
from jax import numpy as jnp

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # where it was in older JAX
    from jax.core import get_opaque_trace_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# scale_loss runs inside the function that is differentiated, and what it sees stays there.
LOSS_MEETS_APPLY = False

# XLA fuses the small sums of a schedule: a branch around them would cost more.
BRANCHES = False

# The gradient of what is broadcast or used in each step of a loop is summed in its own dtype.
NARROW_SUMS = True


def convolution_dtype(dtype: str) -> str:
    """Return the dtype in which convolutions compute whose inputs have `dtype`."""
    return dtype


def recurrence_dtype(dtype: str) -> str:
    """Return the dtype for a whole LSTM or GRU that computes in `dtype`."""
    return dtype


def dense_values(gradient: Any) -> Any:
    """Return the numbers of a gradient."""
    return gradient


def with_values(gradient: Any, values: Any) -> Any:  # noqa: ARG001 - one signature for all backends
    """Return `gradient` with other numbers at the same places."""
    return values


def checked(values: Sequence[Any], exactly: Callable[[], Any]) -> Any:  # noqa: ARG001
    """Return which values are finite, as `exactly` does: nothing here is quicker."""
    return exactly()


def place() -> tuple[Any, Any]:
    """Return what tells this replica and this trace from others; eager code has one of its own."""
    return None, get_opaque_trace_state(convention="flax")


def refuse_no_replica() -> None:
    """Raise where gradients have no replica: never here."""


def agreed(grads: Sequence[Any], variables: Sequence[Any], losses: Any) -> tuple[Any, Any]:  # noqa: ARG001
    """Return the gradients and the losses as all replicas see them.

    On JAX the arrays of a step are global: every device sees the same ones already.
    """
    return grads, losses


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


def keep_apart(variable: Any, other: Any) -> None:
    """Give a variable a buffer of its own where it shares that of another one.

    Keras writes averages into weights by handing the array on, and the first step of the next `fit`
    then donates one buffer twice, which is an error.
    """
    if variable.value is other.value:
        variable.assign(jnp.copy(other.value))


def add_to(variable: Any, value: Any) -> None:
    """Add to a variable."""
    variable.assign_add(value)


def matmul_wide(left: Any, right: Any, dtype: str) -> Any:
    """Return the matrix product in `dtype`, without rounding it to that of the factors.

    The factors stay as they are, so that a GPU multiplies float16 numbers in its tensor cores.
    """
    return jnp.matmul(left, right, preferred_element_type=dtype)


def has_flash_attention(query: Any, key: Any, value: Any, *, is_causal: bool) -> bool:  # noqa: ARG001
    """Return whether Keras would use flash attention here if it were left to choose."""
    # Only Keras knows, and has no public name for it.
    from keras.src.backend.jax.nn import _can_use_flash_attention

    return bool(_can_use_flash_attention(query, key, value, None))


def sync(model: Any) -> None:
    """Make the variables current: during `fit` on JAX their values travel outside them."""
    model.jax_state_sync()


def in_dtype(value: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
    """Return an array in another dtype, sharded as it is, and what puts back what this changed."""
    return jax.device_put(value.astype(dtype), value.sharding), lambda: None


def mixes_dtypes(error: Exception) -> bool:
    """Return whether an error says that operands of different float dtypes met."""
    return isinstance(error, TypeError) and "requires arguments to have the same dtypes" in str(
        error
    )


def train_step(
    model: Any,
    optimizers: Sequence[Any],
    step: Callable[..., Any],
    logs_after: Callable[[Any, Any], Any],
    *args: Any,
) -> tuple[Any, Sequence[Any]]:
    """Run a pure train step and undo its traces if the optimizer skipped.

    Args:
        model: The model.
        optimizers: Those of ours that it has; the state is that of the compiled one alone.
        step: The step, which takes `state` and `data` and returns logs and state.
        logs_after: Makes of the logs, and whether the step was skipped, those to return.
        *args: The state: trainable, non-trainable, optimizer and metrics variables, as Keras passes
            them; and the batch.

    Returns:
        The logs and the new state.
    """
    if not any(o is model.optimizer for o in optimizers):
        return cast("tuple[Any, Sequence[Any]]", step(*args))
    (_, before, before_optimizer, metrics_before), _ = args
    with _losses_seen_by(model) as losses:
        logs, (trainable, after, optimizer, metrics_after) = step(*args)
    with keras.StatelessScope(
        state_mapping=list(zip(model.optimizer.variables, before_optimizer, strict=True))
    ):
        skips = model.optimizer.skips()
    with keras.StatelessScope(
        state_mapping=list(zip(model.optimizer.variables, optimizer, strict=True))
    ):
        skipped = model.optimizer.skips() != skips
    if losses:
        finite = jnp.all(jnp.isfinite(losses[-1]))
        optimizer = model.optimizer.with_known_loss(before_optimizer, optimizer, finite)
    after = _choose(skipped, before, after)
    metrics = _choose(skipped, metrics_before, metrics_after)
    with keras.StatelessScope(
        state_mapping=list(zip(model.metrics_variables, metrics, strict=True))
    ):
        logs = logs_after(logs, skipped)
    return logs, (trainable, after, optimizer, metrics)


@contextlib.contextmanager
def _losses_seen_by(model: Any) -> Iterator[list[Any]]:
    """Collect what the model's loss metric is given, unscaled and outside what is differentiated.

    What the metric makes of it tells less: a total that is inf or NaN stays so for an epoch.
    """
    losses: list[Any] = []
    metric = next((m for m in model.metrics if m.name == "loss"), None)
    if not isinstance(metric, keras.metrics.Mean):  # a user's own
        yield losses
        return
    update_state = metric.update_state

    def update_and_keep(values: Any, *args: Any, **kwargs: Any) -> Any:
        losses.append(values)
        return update_state(values, *args, **kwargs)

    # Around Keras's own __setattr__: this is no state.
    object.__setattr__(metric, "update_state", update_and_keep)
    try:
        yield losses
    finally:
        object.__delattr__(metric, "update_state")


def _choose(skipped: Any, before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    # What the step passed through untouched, a frozen backbone say, needs no choice and no kernel.
    return [
        new if new is old else jax.tree.map(lambda o, n: jnp.where(skipped, o, n), old, new)
        for old, new in zip(before, after, strict=True)
    ]


# The products that a user's layer may call itself; `kerasmp.backend.products` counts them.
PRODUCTS = tuple((jnp, name) for name in ("matmul", "dot", "inner", "vdot", "einsum", "tensordot"))


def eagerly() -> Any:
    """Let all be computed when it is called, each step of a loop and what is compiled too."""
    return jax.disable_jit()


# Nothing more has to be replaced for that.
COMPILED: tuple[Any, ...] = ()
