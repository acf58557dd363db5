"""One step of the wrapped optimizer, as functions that read nothing but their arguments."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from keras import ops

from kerasmp import backend
from kerasmp.backend.protocol import wide_dtype
from kerasmp.optimizer.causes import all_finite, cause_of
from kerasmp.optimizer.counters import APPLIED, skipped_last, with_skip
from kerasmp.optimizer.gradient_statistics import STATISTICS
from kerasmp.optimizer.unscaled_gradients import divided, takes_gradient_as_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kerasmp.loss_scale import LossScale
    from kerasmp.optimizer.fused import Fused


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step is given.

    Attributes:
        grads: One gradient, or None, for each variable.
        variables: The variables that they belong to.
        dtypes: Keras's name of the dtype of each variable.
        positions: The index of each variable among those that the optimizer was built with.
        scale: What the gradients are to be divided by, a float32 scalar.
        scaled: Whether their loss was scaled; else the schedule has no part in the step, and stays.
        unscaled: Whether they are those of the unscaled loss already; `scale` is 1 then.
        losses: The losses, as far as they are known; any that is not finite is to blame.
        clips: Whether "each" is clipped by its norm, or "all" by theirs, which must be finite then;
            or None.
        fused: The inner optimizer's update, where it has one in a kernel for each variable.
        through: The method that was called for it, which a user's inner optimizer may have of its
            own: "apply", "apply_gradients" or "stateless_apply".
    """

    grads: Sequence[Any]
    variables: Sequence[Any]
    dtypes: Sequence[str]
    positions: Sequence[int]
    scale: Any
    scaled: bool
    unscaled: bool
    losses: Sequence[Any]
    clips: str | None
    fused: Fused | None
    through: str


class State(NamedTuple):
    """What a step moves beside the variables of the inner optimizer, as tensors.

    Attributes:
        schedule: The state of the schedule, by its own keys.
        counts: The counters of `kerasmp.optimizer.counters`.
        nonfinite_counts: For each variable, in how many steps its gradient was not finite.
    """

    schedule: dict[str, Any]
    counts: Any
    nonfinite_counts: Any


def unscale(step: Step) -> list[Any]:
    """Return the gradients of the unscaled loss, which the inner optimizer gets."""
    if step.unscaled:
        return list(step.grads)
    return [divided(g, v, step.scale) for g, v in zip(step.grads, step.variables, strict=True)]


def finite_gradients(step: Step) -> Any:
    """Return a bool vector, for each gradient (None left out) whether all of it is finite.

    As the variables will see them: divided by the scale, which one below 1, or one of 0 that a
    checkpoint brought, makes infinite; and in the dtype of a float16 variable, which ends at 65504.
    What is a new value and no gradient is looked at in the same way, though it is not divided.

    Where they are clipped by their norm, one that is too large to be squared is not finite either:
    of an infinite norm Keras makes NaN, or zeros.
    """
    return _ask(step, backend.current().finite_per_tensor)


def all_gradients_finite(step: Step) -> tuple[Any, Callable[[], Any]]:
    """Return whether `finite_gradients` says so of all, a scalar bool, and what returns it."""
    found: tuple[Any, Callable[[], Any]] = _ask(step, backend.current().all_finite)
    return found


def _ask(step: Step, question: Callable[..., Any]) -> Any:
    framework = backend.current()
    values = [framework.dense_values(g) for g in step.grads if g is not None]
    kept = [d for g, d in zip(step.grads, step.dtypes, strict=True) if g is not None]
    if not values:  # of a frozen model
        values, kept = [ops.zeros((1,))], ["float32"]
    dtypes = [k if k == "float16" else wide_dtype(g) for g, k in zip(values, kept, strict=True)]
    return question(values, dtypes, step.scale, norm=step.clips)


def next_state(
    schedule: LossScale, state: State, step: Step, finite: Any, *, applied: bool
) -> State:
    """Return the state after a step.

    Args:
        schedule: The schedule.
        state: The state before it.
        step: The step.
        finite: What `finite_gradients` returned; of a step that was applied it may be None.
        applied: Whether it was applied, or skipped.
    """
    if applied:
        return _after_update(schedule, state, step) if step.scaled else _counted(state)
    after = _after_skip(schedule, state, step, finite)
    return after if step.scaled else after._replace(schedule=state.schedule)


def _counted(state: State) -> State:
    return state._replace(counts=state.counts + ops.array(APPLIED, state.counts.dtype))


def _after_update(schedule: LossScale, state: State, step: Step) -> State:
    before = state.schedule

    def moved() -> dict[str, Any]:
        measured = _measured(schedule, step, before["scale"])
        return _like(before, schedule.update(before, True, **measured))

    def counted() -> dict[str, Any]:
        return before | {"step_counter": before["step_counter"] + 1}

    after = backend.current().branch_if_cheap(before, schedule.only_counts, counted, moved)
    return _counted(state)._replace(schedule=after)


def _after_skip(schedule: LossScale, state: State, step: Step, finite: Any) -> State:
    before = state.schedule
    after = schedule.update(before, False, **dict.fromkeys(schedule.measures, ops.zeros(())))
    loss_finite = all_finite(step.losses) if step.losses else None
    if loss_finite is not None:
        after = _unless_loss_is_to_blame(loss_finite, before, after)
    cause = cause_of(loss_finite, before["scale"], schedule.min_scale)
    hit = ops.cast(ops.logical_not(finite), state.nonfinite_counts.dtype)
    positions = [p for p, g in zip(step.positions, step.grads, strict=True) if g is not None]
    if positions != list(range(state.nonfinite_counts.shape[0])):
        indices = ops.array(positions)[:, None]
        hit = ops.scatter(indices, hit, tuple(state.nonfinite_counts.shape))
    return State(_like(before, after), with_skip(state.counts, cause), state.nonfinite_counts + hit)


def _like(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {key: ops.cast(after[key], before[key].dtype) for key in before}


def _measured(schedule: LossScale, step: Step, scale: Any) -> dict[str, Any]:
    """Return what the schedule wants to know of the gradients."""
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


def with_known_loss(schedule: LossScale, before: State, after: State, loss_finite: Any) -> State:
    """Return the state after a step whose loss became known only afterwards.

    Args:
        schedule: The schedule.
        before: The state before the step.
        after: The state after it, by `next_state` with an unknown loss.
        loss_finite: Scalar bool tensor.

    Returns:
        What `next_state` would have returned, had it known.
    """
    skipped = skipped_last(after.counts)
    # An applied step moved the schedule by what it measured, whatever the loss was.
    keep = ops.logical_or(ops.logical_not(skipped), loss_finite)
    cause = cause_of(loss_finite, before.schedule["scale"], schedule.min_scale)
    return State(
        _unless_loss_is_to_blame(keep, before.schedule, after.schedule),
        ops.where(skipped, with_skip(before.counts, cause), after.counts),
        after.nonfinite_counts,
    )


def _unless_loss_is_to_blame(
    loss_finite: Any, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """Return the schedule's state after a skipped step: as before if no scale could have helped."""
    return {key: ops.where(loss_finite, after[key], before[key]) for key in after}
