"""Runs steps: reads their inputs from the optimizer, and assigns the results to its variables."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.keras_internals import values_of
from kerasmp.backend.nested import optimizer_chain, overrides_stateless_apply
from kerasmp.backend.optimizer_internals import weights_and_averages
from kerasmp.optimizer.clipping import clip, clip_divisors
from kerasmp.optimizer.scale_tracking import is_loss_scaled
from kerasmp.optimizer.settings import refuse_second_scale
from kerasmp.optimizer.step import (
    State,
    Step,
    all_gradients_finite,
    finite_gradients,
    next_state,
    state_with_known_loss,
    unscale,
)
from kerasmp.optimizer.step_cache import current_rates, trace_constants, with_rates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer

# The method of the inner optimizer to call. It is not an argument, since a subclass may have an
# `apply` that takes only gradients and variables. Each replica has a thread and a context.
_METHOD: contextvars.ContextVar[str] = contextvars.ContextVar("_METHOD", default="apply")


@contextlib.contextmanager
def using_method(name: str) -> Iterator[None]:
    """Make the steps that begin here call this method of the inner optimizer."""
    token = _METHOD.set(name)
    try:
        yield
    finally:
        _METHOD.reset(token)


def prepare_step(
    optimizer: LossScaleOptimizer, grads: Sequence[Any], variables: Sequence[Any]
) -> Step:
    """Build the optimizer, and return the step for these gradients and what was noted for it.

    Args:
        optimizer: The optimizer.
        grads: One gradient, or None, for each variable.
        variables: The variables.

    Raises:
        LossScaleError: If the inner optimizer has a loss scale too, only a part of the gradients
            is unscaled, or it is not known whether they are unscaled or their loss was scaled.
    """
    inner, fused = optimizer.inner_optimizer, optimizer.fused_update
    # An optimizer with a fused update has exactly the methods of Keras, and so no other one inside.
    inside = optimizer_chain(inner) if fused is None else [inner]
    refuse_second_scale(inside)
    framework = backend.current()
    context = framework.trace_context()
    pending = optimizer.pending
    by_user = pending.unscaled.check(*context, grads)
    loss_scaled = is_loss_scaled(optimizer)
    unscaled = by_user or not loss_scaled
    optimizer.build(variables)
    pending.unscaled.remove(*context)
    grads, losses = framework.all_reduce(grads, variables, pending.losses.pop(*context))
    dtypes = framework.dtypes_of(variables)
    each = "each" if any(inner.clipnorm for inner in inside) else None
    return Step(
        grads=grads,
        variables=variables,
        dtypes=dtypes,
        indices=optimizer.indices_of(variables),
        # The cast returns a tensor. TensorFlow would read the variable again for each gradient.
        scale=ops.ones(()) if unscaled else ops.cast(optimizer.scale_variable, "float32"),
        loss_scaled=loss_scaled,
        unscaled=unscaled,
        losses=losses,
        clip_norm="all" if any(inner.global_clipnorm for inner in inside) else each,
        fused=None if fused is None else fused.for_step(grads, variables, dtypes),
        method=_METHOD.get(),
    )


def run(optimizer: LossScaleOptimizer, step: Step) -> None:
    """Run a step, and assign its results."""
    framework = backend.current()
    if framework.NEEDS_PURE_STEP:
        _run_compiled(optimizer, step)
        return
    update = functools.partial(_update, optimizer.inner_optimizer)
    advance = functools.partial(_advance, optimizer)
    finite = finite_gradients(step)
    framework.run_step(step, finite, update, advance, fused=step.fused is not None)


def run_pure(
    optimizer: LossScaleOptimizer,
    inner: Any,
    step: Step,
    variables: Sequence[Any],
    values: Sequence[Any],
) -> list[Any]:
    """Return the values of variables after a step.

    Args:
        optimizer: The optimizer.
        inner: Its inner optimizer, or a copy of that with other settings.
        step: The step.
        variables: All variables that a step may change.
        values: Their values before the step.
    """
    all_finite, finite = all_gradients_finite(step)
    divisors = clip_divisors(inner, step)

    def values_after(*, applied: bool) -> Callable[[], list[Any]]:
        def branch() -> list[Any]:
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping) as scope:
                if applied:
                    _update(*((inner, step) if divisors is None else clip(inner, step, divisors)))
                _advance(optimizer, step, None if applied else finite(), applied)
            return [scope.get_current_value(v) for v in variables]

        return branch

    return list(ops.cond(all_finite, values_after(applied=True), values_after(applied=False)))


def _run_compiled(optimizer: LossScaleOptimizer, step: Step) -> None:
    """Run a step as a pure function, compiled once, since JAX branches in pure code only."""
    inner = optimizer.inner_optimizer
    variables = [*optimizer.target_variables, *optimizer.variables]
    # The compiled step must not hold the tensors of the first one, which would never be freed.
    settings = dataclasses.replace(step, grads=(), losses=(), scale=None)

    def compiled_step(tensors: dict[str, Any], rates: Any, values: Any) -> list[Any]:
        step = dataclasses.replace(settings, **tensors)
        return run_pure(optimizer, with_rates(inner, rates), step, variables, values)

    # A new function would be compiled again in each step.
    flags = (step.loss_scaled, step.unscaled, step.method)
    key = (*flags, tuple(step.indices), trace_constants(inner))
    compiled = optimizer.pending.compiled.get(
        key, lambda: backend.current().compile_step(compiled_step)
    )
    tensors = {"grads": step.grads, "losses": step.losses, "scale": step.scale}
    after = compiled(tensors, current_rates(inner), [v.value for v in variables])
    for variable, value in zip(variables, after, strict=True):
        variable.assign(value)


def _update(inner: Any, step: Step, applied: Any = None) -> None:
    """Update the variables by the inner optimizer, or by the fused update that does the same."""
    if step.fused is not None:
        step.fused(step, applied)
        return
    updates = unscale(step)
    if any(optimizer.gradient_accumulation_steps for optimizer in optimizer_chain(inner)):
        # Keras's accumulators have the dtypes of their variables, and take no other.
        framework = backend.current()
        updates = [
            None
            if u is None
            else framework.replace_values(u, ops.cast(framework.dense_values(u), dtype))
            for u, dtype in zip(updates, step.dtypes, strict=True)
        ]
    if step.method == "apply_gradients":
        inner.apply_gradients(list(zip(updates, step.variables, strict=True)))
    elif step.method == "stateless_apply" and overrides_stateless_apply(inner):
        slots = inner.variables
        weights, state = inner.stateless_apply(values_of(slots), updates, values_of(step.variables))
        for variable, value in zip([*step.variables, *slots], [*weights, *state], strict=True):
            variable.assign(value)
    else:
        inner.apply(updates, step.variables)


def _advance(optimizer: LossScaleOptimizer, step: Step, finite: Any, applied: bool) -> None:  # noqa: FBT001 - called by the backend
    """Update the schedule and the counters after a step that was applied or skipped."""
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


def with_known_loss(
    self: LossScaleOptimizer, before: Sequence[Any], after: Sequence[Any], loss_finite: Any
) -> list[Any]:
    """Correct the optimizer's values after a step whose loss became known only afterwards.

    Args:
        self: The optimizer.
        before: The values of `variables` before the step.
        after: The values after it, from `stateless_apply` without a known loss.
        loss_finite: Scalar bool tensor.

    Returns:
        What `stateless_apply` would have returned if it had known the loss.
    """
    index = {id(variable): i for i, variable in enumerate(self.variables)}
    indices = [index[id(variable)] for variable in self.state_variables()]
    known = state_with_known_loss(
        self.schedule,
        _state(self, [before[i] for i in indices]),
        _state(self, [after[i] for i in indices]),
        loss_finite,
    )
    corrected = dict(zip(indices, _values(known), strict=True))
    return [corrected.get(i, value) for i, value in enumerate(after)]


def finalize_variable_values(self: LossScaleOptimizer, var_list: Sequence[Any]) -> None:
    """Copy the averages (`use_ema`) to the weights at the end of `fit`.

    Before the first applied step, there are no averages but copies of the weights at `build`.

    Args:
        self: The optimizer.
        var_list: The trainable variables.
    """
    if int(ops.convert_to_numpy(self.iterations)) > 0:
        self.inner_optimizer.finalize_variable_values(var_list)
        for variable, average in weights_and_averages(self.inner_optimizer):
            backend.current().unshare_memory(average, variable)
