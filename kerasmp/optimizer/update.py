"""Steps on the variables of an optimizer: what they need is read, what they make assigned."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.keras_internals import held, learning_rate_functions, weights_and_averages
from kerasmp.backend.nested import has_own_pure_step, optimizer_chain
from kerasmp.optimizer import arguments
from kerasmp.optimizer import step as pure_step
from kerasmp.optimizer.causes import Forgetful, LossNotes
from kerasmp.optimizer.clipping import clipped, divisors
from kerasmp.optimizer.scaled_losses import is_scaled
from kerasmp.optimizer.step import (
    State,
    Step,
    all_gradients_finite,
    finite_gradients,
    next_state,
    unscale,
)
from kerasmp.optimizer.step_cache import StepCache, kept_by_a_trace, rates_now, with_rates
from kerasmp.optimizer.unscaled_gradients import UnscaledMarks, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer


# In the thread of its replica. A user's `apply` is given gradients and variables, and no more.
_THROUGH: contextvars.ContextVar[str] = contextvars.ContextVar("_THROUGH", default="apply")


@contextlib.contextmanager
def through(method: str) -> Iterator[None]:
    """Let the steps that are taken here reach the inner optimizer through this method of it."""
    token = _THROUGH.set(method)
    try:
        yield
    finally:
        _THROUGH.reset(token)


class Pending(Forgetful):
    """What belongs to steps that are under way, and is no state of the optimizer.

    Attributes:
        losses: Those that were noted for the next step.
        unscaled: Where gradients were unscaled by hand.
        compiled: Steps that JAX has compiled.
    """

    def __init__(self) -> None:
        self.losses = LossNotes()
        self.unscaled = UnscaledMarks()
        self.compiled = StepCache()


def taken(optimizer: LossScaleOptimizer, grads: Sequence[Any], variables: Sequence[Any]) -> Step:
    """Return the step that gradients make, with what was noted for it; build the optimizer.

    Args:
        optimizer: The optimizer.
        grads: One gradient, or None, for each variable.
        variables: The variables.

    Raises:
        LossScaleError: If the inner optimizer scales too, the gradients are not those that were
            unscaled, or it cannot be known whether their loss was scaled.
    """
    inner, fused = optimizer.inner_optimizer, optimizer.fused_update
    # One of exactly Keras's class and methods, as fused ones are, uses no others.
    inside = optimizer_chain(inner) if fused is None else [inner]
    arguments.refuse_second_scale(inside)
    framework = backend.current()
    context = framework.trace_context()
    by_hand = optimizer.pending.unscaled.look(*context, number_of(grads))
    scaled = is_scaled(optimizer)
    unscaled = by_hand or not scaled
    optimizer.build(variables)
    optimizer.pending.unscaled.drop(*context)
    grads, losses = framework.all_reduce(grads, variables, optimizer.pending.losses.take(*context))
    dtypes = framework.dtypes_of(variables)
    if fused is not None:
        fused = fused.suited(grads, variables, dtypes)
    # A cast gives TensorFlow a tensor: the variable itself it would read for each gradient.
    scale = ops.ones(()) if unscaled else ops.cast(optimizer.scale_variable, "float32")
    each = "each" if any(inner.clipnorm for inner in inside) else None
    clips = "all" if any(inner.global_clipnorm for inner in inside) else each
    indices = optimizer.indices_of(variables)
    known = (grads, variables, dtypes, indices, scale, scaled, unscaled, losses, clips, fused)
    return Step(*known, _THROUGH.get())


def run(optimizer: LossScaleOptimizer, step: Step) -> None:
    """Take a step, and assign what comes of it."""
    framework = backend.current()
    if framework.PURE:
        _run_compiled(optimizer, step)
        return

    def update(step: Step, applied: Any) -> None:
        _update(optimizer.inner_optimizer, step, applied)

    def advance(step: Step, finite: Any, applied: bool) -> None:  # noqa: FBT001 - a callback
        _advance(optimizer, step, finite, applied=applied)

    finite = finite_gradients(step)
    framework.run_step(step, finite, update, advance, fused=step.fused is not None)


def pure(
    optimizer: LossScaleOptimizer,
    inner: Any,
    step: Step,
    touched: Sequence[Any],
    values: Sequence[Any],
) -> list[Any]:
    """Return what a step makes of `values`, the current values of the variables `touched`.

    Args:
        optimizer: The optimizer.
        inner: The one inside it, or one that stands for it.
        step: The step.
        touched: All variables that a step may change.
        values: Their values.
    """
    all_finite, finite = all_gradients_finite(step)
    by = divisors(inner, step)

    def values_after(*, applied: bool) -> Callable[[], list[Any]]:
        def take() -> list[Any]:
            mapping = list(zip(touched, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping) as scope:
                if applied:
                    taking = (inner, step) if by is None else clipped(inner, step, by)
                    _update(*taking, None)
                _advance(optimizer, step, None if applied else finite(), applied=applied)
            return [scope.get_current_value(v) for v in touched]

        return take

    return list(ops.cond(all_finite, values_after(applied=True), values_after(applied=False)))


def with_known_loss(
    self: LossScaleOptimizer, before: Sequence[Any], after: Sequence[Any], loss_finite: Any
) -> list[Any]:
    """Return the optimizer's values after a step whose loss became known only afterwards.

    Args:
        self: The optimizer.
        before: Values of `variables` before the step.
        after: The same after it, by `stateless_apply` with an unknown loss.
        loss_finite: Scalar bool tensor.

    Returns:
        What `stateless_apply` would have returned, had it known.
    """
    index = {id(variable): i for i, variable in enumerate(self.variables)}
    indices = [index[id(variable)] for variable in self.state_variables()]
    known = pure_step.with_known_loss(
        self.schedule,
        _state(self, [before[i] for i in indices]),
        _state(self, [after[i] for i in indices]),
        loss_finite,
    )
    moved = dict(zip(indices, _values(known), strict=True))
    return [moved.get(i, value) for i, value in enumerate(after)]


def finalize_variable_values(self: LossScaleOptimizer, var_list: Sequence[Any]) -> None:
    """Write averages (`use_ema`) into the weights at the end of `fit`.

    Before the first applied step there are none: they are what the weights were at `build`.
    """
    if int(ops.convert_to_numpy(self.iterations)) > 0:
        self.inner_optimizer.finalize_variable_values(var_list)
        for variable, average in weights_and_averages(self.inner_optimizer):
            backend.current().keep_apart(average, variable)


def _update(inner: Any, step: Step, applied: Any) -> None:
    """Let the inner optimizer, or the update that does the same, change the variables."""
    if step.fused is not None:
        step.fused(step, applied)
        return
    updates = unscale(step)
    if any(optimizer.gradient_accumulation_steps for optimizer in optimizer_chain(inner)):
        # Keras's accumulators have the dtype of their variable and take no other.
        framework = backend.current()
        updates = [
            None
            if u is None
            else framework.with_values(u, ops.cast(framework.dense_values(u), dtype))
            for u, dtype in zip(updates, step.dtypes, strict=True)
        ]
    if step.through == "apply_gradients":
        inner.apply_gradients(list(zip(updates, step.variables, strict=True)))
    elif step.through == "stateless_apply" and has_own_pure_step(inner):
        kept = inner.variables
        values = inner.stateless_apply(held(kept), updates, held(step.variables))
        for variable, value in zip([*step.variables, *kept], [*values[0], *values[1]], strict=True):
            variable.assign(value)
    else:
        inner.apply(updates, step.variables)


def _advance(optimizer: LossScaleOptimizer, step: Step, finite: Any, *, applied: bool) -> None:
    """Move the schedule and the counters after a step that was applied or skipped."""
    variables = optimizer.state_variables()
    state = _state(optimizer, [ops.convert_to_tensor(v) for v in variables])
    after = next_state(optimizer.schedule, state, step, finite, applied=applied)
    for variable, old, new in zip(variables, _values(state), _values(after), strict=True):
        if new is not old:
            variable.assign(new)


def _state(optimizer: LossScaleOptimizer, values: Sequence[Any]) -> State:
    *schedule, counts, nonfinite_counts = values
    keys = optimizer.schedule.init()
    return State(dict(zip(keys, schedule, strict=True)), counts, nonfinite_counts)


def _values(state: State) -> list[Any]:
    return [*state.schedule.values(), state.counts, state.nonfinite_counts]


def _run_compiled(optimizer: LossScaleOptimizer, step: Step) -> None:
    """Take a step as JAX must, which branches in pure code only: compiled once."""
    inner = optimizer.inner_optimizer
    touched = [*optimizer.target_variables, *optimizer.variables]
    # Not the first step itself, whose gradients would live as long as the program.
    plan = dataclasses.replace(step, grads=(), losses=(), scale=None)

    def take(given: dict[str, Any], rates: Any, values: Any) -> list[Any]:
        this = dataclasses.replace(plan, **given)
        return pure(optimizer, with_rates(inner, rates), this, touched, values)

    # Made anew each time, the step would be compiled each time.
    how = (step.scaled, step.unscaled, step.through)
    key = (*how, tuple(step.positions), kept_by_a_trace(inner))
    compiled = optimizer.pending.compiled.get(key, lambda: backend.current().compiled(take))
    given = {"grads": step.grads, "losses": step.losses, "scale": step.scale}
    rates = rates_now(learning_rate_functions(inner))
    after = compiled(given, rates, [v.value for v in touched])
    for variable, value in zip(touched, after, strict=True):
        variable.assign(value)
