"""One step of the wrapped optimizer: check the gradients, update or skip, move the scale."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.nested import optimizers_in
from kerasmp.optimizer.causes import all_finite, cause_of
from kerasmp.optimizer.counters import APPLIED, skipped_last, with_skip
from kerasmp.optimizer.measures import MEASURES
from kerasmp.optimizer.state import ScalingState
from kerasmp.optimizer.unscaled import divided, takes_gradient_as_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step is given.

    Attributes:
        grads: One gradient, or None, for each variable.
        variables: The variables that they belong to.
        unscaled: Whether the gradients are those of the unscaled loss already.
        losses: The losses, as far as they are known; any that is not finite is to blame.
        updates: The gradients of the unscaled loss, which the inner optimizer gets.
    """

    grads: Sequence[Any]
    variables: Sequence[Any]
    unscaled: bool
    losses: Sequence[Any]
    updates: Sequence[Any] = ()


class SteppingState(ScalingState):
    """The state of `LossScaleOptimizer`, and what a step makes of it."""

    def _finite(self, step: Step) -> Any:
        """Return a bool vector, for each gradient (None left out) whether all of it is finite."""
        pairs = zip(step.updates, step.variables, strict=True)
        values = [_as_kept(g, v) for g, v in pairs if g is not None]
        if not values:
            return ops.ones((1,), dtype="bool")
        return backend.current().checked(
            values, lambda: ops.stack([ops.all(ops.isfinite(v)) for v in values])
        )

    def _with_updates(self, step: Step) -> Step:
        """Return the step with its gradients unscaled.

        Before the check, so that it sees what the inner optimizer would: what a scale below 1, or
        one of 0 that a checkpoint brought, makes of gradients that were finite.
        """
        if step.unscaled:
            return dataclasses.replace(step, updates=step.grads)
        # A cast gives TensorFlow a tensor: the variable itself it would read for each gradient.
        scale = ops.cast(self.dynamic_scale, "float32")
        pairs = zip(step.grads, step.variables, strict=True)
        return dataclasses.replace(step, updates=[divided(g, v, scale) for g, v in pairs])

    def _update(self, step: Step) -> None:
        """Hand the unscaled gradients to the inner optimizer."""
        inner = self.inner_optimizer
        updates = list(step.updates)
        if any(optimizer.gradient_accumulation_steps for optimizer in optimizers_in(inner)):
            # Keras's accumulators have the dtype of their variable and take no other.
            pairs = zip(updates, step.variables, strict=True)
            updates = [None if u is None else _cast(u, v.dtype) for u, v in pairs]
        inner.apply(updates, step.variables)

    def _advance(self, step: Step, finite: Any, applied: bool) -> None:  # noqa: FBT001 - a callback
        """Move the schedule and the counters after a step that was applied or skipped."""
        if applied:
            self._advance_after_update(step)
        else:
            self._advance_after_skip(step, finite)

    def _advance_after_update(self, step: Step) -> None:
        room = backend.current()
        room.add_to(self.counts_variable, APPLIED)
        before = self._schedule_values()

        def move() -> None:
            measured = self._measured(step)
            self._assign_schedule(self.schedule.update(before, True, **measured))

        only_counts = self.schedule.only_counts(before) if room.BRANCHES else None
        if only_counts is None:
            move()
        else:
            room.branch(only_counts, lambda: room.add_to(self.step_counter, 1), move)

    def _advance_after_skip(self, step: Step, finite: Any) -> None:
        before = self._schedule_values()
        nothing = dict.fromkeys(self.schedule.measures, ops.zeros(()))
        after = self.schedule.update(before, False, **nothing)
        loss_finite = all_finite(step.losses) if step.losses else None
        if loss_finite is not None:
            after = unless_loss_is_to_blame(loss_finite, before, after)
        # Before anything is assigned: what was read may be the variable itself.
        cause = cause_of(loss_finite, before["scale"], self.schedule.min_scale)
        self._assign_schedule(after)
        self.counts_variable.assign(with_skip(self.counts_variable, cause))
        self._count_nonfinite(step, finite)

    def _schedule_values(self) -> dict[str, Any]:
        return {key: ops.convert_to_tensor(v) for key, v in self._schedule_variables().items()}

    def _assign_schedule(self, after: dict[str, Any]) -> None:
        for key, variable in self._schedule_variables().items():
            variable.assign(ops.cast(after[key], variable.dtype))

    def _measured(self, step: Step) -> dict[str, Any]:
        """Return what the schedule wants to know of the gradients."""
        names = self.schedule.measures
        if not names:
            return {}
        scale = ops.convert_to_tensor(self.dynamic_scale)
        grads = [
            backend.current().dense_values(g)
            for g, v in zip(step.grads, step.variables, strict=True)
            if g is not None and not takes_gradient_as_value(v)
        ]
        if step.unscaled:
            grads = [ops.cast(g, "float32") * scale for g in grads]
        return {name: MEASURES[name](grads, scale) for name in names}

    def _count_nonfinite(self, step: Step, finite: Any) -> None:
        positions = [
            self._get_variable_index(v)
            for g, v in zip(step.grads, step.variables, strict=True)
            if g is not None
        ]
        counts = self.nonfinite_counts_variable
        hit = ops.cast(ops.logical_not(finite), counts.dtype)
        if positions != list(range(len(self._trainable_variables))):
            hit = ops.scatter(ops.array(positions)[:, None], hit, tuple(counts.shape))
        counts.assign_add(hit)

    def _pure_step(self, step: Step, touched: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Return what a step makes of `values`, the current values of the variables `touched`."""
        mapping = list(zip(touched, values, strict=True))

        def stateless(run: Callable[[], None]) -> Callable[[], list[Any]]:
            def values_after() -> list[Any]:
                with keras.StatelessScope(state_mapping=mapping) as scope:
                    run()
                return [scope.get_current_value(v) for v in touched]

            return values_after

        with keras.StatelessScope(state_mapping=mapping):
            step = self._with_updates(step)
            finite = self._finite(step)

        def applied() -> None:
            self._update(step)
            self._advance(step, finite, True)

        def skipped() -> None:
            self._advance(step, finite, False)

        return list(ops.cond(ops.all(finite), stateless(applied), stateless(skipped)))

    def with_known_loss(
        self, before: Sequence[Any], after: Sequence[Any], loss_finite: Any
    ) -> list[Any]:
        """Return the optimizer's values after a step whose loss became known only afterwards.

        Args:
            before: Values of `variables` before the step.
            after: The same after it, by `stateless_apply` with an unknown loss.
            loss_finite: Scalar bool tensor.

        Returns:
            What `stateless_apply` would have returned, had it known.
        """
        place = {id(variable): i for i, variable in enumerate(self.variables)}
        after = list(after)
        counts = place[id(self.counts_variable)]
        skipped = skipped_last(after[counts])
        in_schedule = {key: place[id(v)] for key, v in self._schedule_variables().items()}
        old = {key: before[i] for key, i in in_schedule.items()}
        new = {key: after[i] for key, i in in_schedule.items()}
        # An applied step moved the schedule by what it measured, whatever the loss was.
        keep = ops.logical_or(ops.logical_not(skipped), loss_finite)
        for key, value in unless_loss_is_to_blame(keep, old, new).items():
            after[in_schedule[key]] = value
        cause = cause_of(loss_finite, old["scale"], self.schedule.min_scale)
        after[counts] = ops.where(skipped, with_skip(before[counts], cause), after[counts])
        return after


def _as_kept(gradient: Any, variable: Any) -> Any:
    """Return the numbers of a gradient as its variable will see them: float16 ends at 65504."""
    values = backend.current().dense_values(gradient)
    if keras.backend.standardize_dtype(variable.dtype) == "float16":
        return ops.cast(values, "float16")
    return values


def _cast(gradient: Any, dtype: Any) -> Any:
    room = backend.current()
    return room.with_values(gradient, ops.cast(room.dense_values(gradient), dtype))


def unless_loss_is_to_blame(
    loss_finite: Any, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """Return the schedule's state after a skipped step: as before if no scale could have helped."""
    return {key: ops.where(loss_finite, after[key], before[key]) for key in after}
