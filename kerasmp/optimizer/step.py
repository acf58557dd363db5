"""One step of the wrapped optimizer, as pure functions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from keras import ops

from kerasmp import backend
from kerasmp.backend.tensors import accumulation_dtype
from kerasmp.optimizer.counters import (
    APPLIED,
    cause_of,
    count_nonfinite,
    count_skip,
    last_step_skipped,
)
from kerasmp.optimizer.gradient_statistics import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kerasmp.loss_scale import LossScale


@dataclasses.dataclass(frozen=True)
class Step:
    """The inputs of one step.

    Attributes:
        grads: One gradient, or None, for each variable.
        variables: The variables that the gradients belong to.
        dtypes: Keras's name of the dtype of each variable.
        indices: The index of each variable among those that the optimizer was built with.
        scale: What the gradients must be divided by, a float32 scalar.
        loss_scaled: Whether the loss was scaled. If not, the schedule does not change.
        unscaled: Whether the gradients are already those of the unscaled loss. Then `scale` is 1.
        losses: The losses that are known. If one is not finite, it is the cause of a skip.
        clip_norm: "each" if each gradient is clipped by its norm, "all" if all are clipped by
            their global norm, else None. A norm that is used must be finite.
        fused: The fused update of the inner optimizer, if it has one for this step.
        method: The method that the user called: "apply", "apply_gradients" or "stateless_apply".
            A user-defined inner optimizer may have its own version of each.
    """

    grads: Sequence[Any]
    variables: Sequence[Any]
    dtypes: Sequence[str]
    indices: Sequence[int]
    scale: Any
    loss_scaled: bool
    unscaled: bool
    losses: Sequence[Any]
    clip_norm: str | None
    fused: Callable[[Step, Any], None] | None
    method: str


class State(NamedTuple):
    """The tensors that a step changes beside the variables of the inner optimizer.

    Attributes:
        schedule: The state of the schedule, by its own keys.
        counts: The counters of `kerasmp.optimizer.counters`.
        nonfinite_counts: For each variable, in how many steps its gradient was not finite or NaN,
            see `count_nonfinite`.
    """

    schedule: dict[str, Any]
    counts: Any
    nonfinite_counts: Any


def takes_gradient_as_value(variable: Any) -> bool:
    """Return whether a variable's "gradient" is its new value, as for the scales of float8."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def divide_gradient(gradient: Any, variable: Any, divisor: Any) -> Any:
    """Return a gradient divided by a scalar, in float32, or in float64 if it has that dtype.

    Args:
        gradient: A gradient, dense or sparse, or None.
        variable: The variable that it belongs to, or None if that is not known. A gradient that is
            the new value of its variable is not divided.
        divisor: The scalar.
    """
    if gradient is None or takes_gradient_as_value(variable):
        return gradient
    framework = backend.current()
    return framework.replace_values(
        gradient, framework.divide(framework.dense_values(gradient), divisor)
    )


def unscale(step: Step) -> list[Any]:
    """Return the gradients of the unscaled loss, for the inner optimizer."""
    if step.unscaled:
        return list(step.grads)
    return [
        divide_gradient(g, v, step.scale) for g, v in zip(step.grads, step.variables, strict=True)
    ]


def finite_gradients(step: Step) -> Any:
    """Return for each gradient that is not None whether it is finite, as a bool vector.

    A gradient is checked as its variable will see it. It is divided by the scale, which can make it
    infinite if the scale is below 1, or 0 from a checkpoint. For a float16 variable it must fit
    float16, which ends at 65504. A gradient that is a new value is checked in the same way,
    although it is not divided.

    If gradients are clipped by their norm, a gradient that is too large to be squared is not
    finite either: Keras makes NaN or zeros from an infinite norm.
    """
    return _check_finite(step, backend.current().finite_per_tensor)


def all_gradients_finite(step: Step) -> tuple[Any, Callable[[], Any]]:
    """Return whether all gradients are finite, and a function that returns `finite_gradients`."""
    found: tuple[Any, Callable[[], Any]] = _check_finite(step, backend.current().all_finite)
    return found


def _check_finite(step: Step, check: Callable[..., Any]) -> Any:
    values = _gradient_values(step)
    # A model without trainable variables has one value and no dtype.
    kept = [d for g, d in zip(step.grads, step.dtypes, strict=True) if g is not None] or ["float32"]
    dtypes = [
        k if k == "float16" else accumulation_dtype(g) for g, k in zip(values, kept, strict=True)
    ]
    return check(values, dtypes, step.scale, norm=step.clip_norm)


def _gradient_values(step: Step) -> list[Any]:
    """Return the values of all gradients that are not None, or a zero if there are none."""
    framework = backend.current()
    values = [framework.dense_values(g) for g in step.grads if g is not None]
    return values or [ops.zeros((1,))]


def _has_nan(step: Step) -> Any:
    """Return for each gradient that is not None whether it has a NaN, as a bool vector."""
    return backend.current().nan_per_tensor(_gradient_values(step))


def all_finite(tensors: Sequence[Any]) -> Any:
    """Return whether these tensors contain neither inf nor NaN, as a scalar bool tensor."""
    return ops.all(ops.stack([ops.all(ops.isfinite(tensor)) for tensor in tensors]))


def next_state(
    schedule: LossScale, state: State, step: Step, finite: Any, *, applied: bool
) -> State:
    """Return the state after a step.

    Args:
        schedule: The schedule.
        state: The state before the step.
        step: The step.
        finite: The result of `finite_gradients`; may be None if the step was applied.
        applied: Whether the step was applied, and not skipped.
    """
    if applied:
        return _after_update(schedule, state, step) if step.loss_scaled else _count_applied(state)
    after = _after_skip(schedule, state, step, finite)
    return after if step.loss_scaled else after._replace(schedule=state.schedule)


def _count_applied(state: State) -> State:
    return state._replace(counts=state.counts + ops.array(APPLIED, state.counts.dtype))


def _after_update(schedule: LossScale, state: State, step: Step) -> State:
    before = state.schedule

    def updated() -> dict[str, Any]:
        statistics = _statistics(schedule, step, before["scale"])
        return _cast_like(before, schedule.update(before, True, **statistics))

    def counted() -> dict[str, Any]:
        return before | {"step_counter": before["step_counter"] + 1}

    after = backend.current().branch_if_cheap(before, schedule.only_counts, counted, updated)
    return _count_applied(state)._replace(schedule=after)


def _after_skip(schedule: LossScale, state: State, step: Step, finite: Any) -> State:
    before = state.schedule
    after = schedule.update(before, False, **dict.fromkeys(schedule.measures, ops.zeros(())))
    loss_finite = all_finite(step.losses) if step.losses else None
    if loss_finite is not None:
        after = _unless_loss_is_to_blame(loss_finite, before, after)
    cause = cause_of(loss_finite, before["scale"], schedule.min_scale)
    numbers = state.nonfinite_counts
    hits = [ops.cast(each, numbers.dtype) for each in (ops.logical_not(finite), _has_nan(step))]
    checked = [i for i, g in zip(step.indices, step.grads, strict=True) if g is not None]
    if checked != list(range(numbers.shape[0])):
        indices = ops.array(checked)[:, None]
        hits = [ops.scatter(indices, hit, tuple(numbers.shape)) for hit in hits]
    return State(
        _cast_like(before, after),
        count_skip(state.counts, cause),
        count_nonfinite(numbers, *hits),
    )


def _cast_like(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {key: ops.cast(after[key], before[key].dtype) for key in before}


def _statistics(schedule: LossScale, step: Step, scale: Any) -> dict[str, Any]:
    """Return the statistics of the gradients that the schedule asks for."""
    if not schedule.measures:
        return {}
    framework = backend.current()
    grads = [
        framework.dense_values(g)
        for g, v in zip(step.grads, step.variables, strict=True)
        if g is not None and not takes_gradient_as_value(v)
    ]
    if step.unscaled:
        grads = [ops.cast(g, "float32") * scale for g in grads]
    return {name: STATISTICS[name](grads, scale) for name in schedule.measures}


def state_with_known_loss(
    schedule: LossScale, before: State, after: State, loss_finite: Any
) -> State:
    """Correct the state after a step whose loss became known only afterwards.

    Args:
        schedule: The schedule.
        before: The state before the step.
        after: The state after the step, from `next_state` without losses.
        loss_finite: Scalar bool tensor.

    Returns:
        What `next_state` would have returned if it had known the loss.
    """
    skipped = last_step_skipped(after.counts)
    # A step that was applied updated the schedule from its gradients, whatever the loss was.
    keep = ops.logical_or(ops.logical_not(skipped), loss_finite)
    cause = cause_of(loss_finite, before.schedule["scale"], schedule.min_scale)
    return State(
        _unless_loss_is_to_blame(keep, before.schedule, after.schedule),
        ops.where(skipped, count_skip(before.counts, cause), after.counts),
        after.nonfinite_counts,
    )


def _unless_loss_is_to_blame(
    loss_finite: Any, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """Return the schedule's state after a skip: unchanged if no scale could have helped."""
    return {key: ops.where(loss_finite, after[key], before[key]) for key in after}
