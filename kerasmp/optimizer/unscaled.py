"""Division by the scale, and loops that do it by hand before they apply the gradients."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp import backend
from kerasmp.errors import LossScaleError
from kerasmp.optimizer.causes import Forgetful, LossNotes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.loss_scale import LossScale


def takes_gradient_as_value(variable: Any) -> bool:
    """Return whether a variable's gradient is no gradient but its new value, as float8's scales."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def divided(gradient: Any, variable: Any, scale: Any) -> Any:
    """Return the gradient of the unscaled loss, in float32, or float64 if it came so.

    Args:
        gradient: A gradient of the scaled loss, sparse or not, or None.
        variable: The variable that it belongs to; None where that is not known.
        scale: The scale.
    """
    if gradient is None or takes_gradient_as_value(variable):
        return gradient
    room = backend.current()
    values = room.dense_values(gradient)
    if keras.backend.standardize_dtype(values.dtype) != "float64":
        values = ops.cast(values, "float32")
    return room.with_values(gradient, ops.divide(values, ops.cast(scale, values.dtype)))


def refuse_baking(value: Any, what: str, fix: str) -> None:
    """Raise if a function that JAX traces here would keep `value` for all its calls.

    Args:
        value: What is read of the optimizer's state.
        what: Who reads it, for the message.
        fix: How to mend it.

    Raises:
        LossScaleError: In a traced function that `value` is no argument of.
    """
    if backend.current().bakes_in(value):
        raise LossScaleError(
            "The traced step would keep the value of its first call for ever.",
            received=f"{what} in a traced function, where the optimizer's state is a constant",
            expected="a scale that is part of the step's state",
            fix=fix,
        )


class UnscaledMarks(Forgetful):
    """Where gradients were unscaled and not applied yet, and how many.

    A place is a replica and a trace. A mark must be taken in the place where it was set: a traced
    function runs again without this code, so that what it set or took would be missing next time.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[Any, Any, int]] = []

    def set(self, replica: Any, trace: Any, number: int) -> None:
        """Remember that gradients were unscaled here.

        Args:
            replica: What tells replicas apart that run the same code.
            trace: What is equal within one trace only; None outside of any.
            number: How many; after none at all there is nothing to remember.

        Raises:
            LossScaleError: If there were some already, and not applied.
        """
        if self._number(replica, trace) is not None:
            raise LossScaleError(
                "Gradients are unscaled twice, which would shrink the update by the scale.",
                received="get_unscaled_gradients a second time before apply",
                expected="one call of it for each apply",
                fix="Apply the gradients of the first call, or drop them with "
                "optimizer.forget_unscaled().",
            )
        if number:
            self._marks.append((replica, trace, number))

    def look(self, replica: Any, trace: Any, number: int) -> bool:
        """Return whether the gradients that are now applied here were unscaled before.

        Args:
            replica: As in `set`.
            trace: As in `set`.
            number: How many gradients are applied.

        Raises:
            LossScaleError: If this replica has unscaled gradients, but in another trace, or another
                number of them.
        """
        unscaled = self._number(replica, trace)
        if unscaled not in {None, number}:
            raise LossScaleError(
                "apply cannot know which of its gradients are unscaled.",
                received=f"{number} gradients (None not counted) after get_unscaled_gradients "
                f"returned {unscaled}",
                expected="all of them in one apply",
                fix="Unscale only what you apply, and apply it in one call. If the unscaled "
                "gradients were not meant to be applied, call optimizer.forget_unscaled().",
            )
        if unscaled is not None:
            return True
        # A trace that failed between the two calls is gone, and its mark means nothing.
        self._marks = [mark for mark in self._marks if not _is_gone(mark[1])]
        # Outside of all replicas there is no number, and those of any of them may be meant.
        if any(None in {other, replica} or other == replica for other, _, _ in self._marks):
            raise LossScaleError(
                "apply cannot know whether its gradients are unscaled.",
                received="get_unscaled_gradients and apply in different traced functions, or one "
                "of them outside of strategy.run",
                expected="both in one function, or both outside of any",
                fix="Move the two calls together. If the unscaled gradients were not meant to be "
                "applied, or the function failed between the two calls, call "
                "optimizer.forget_unscaled().",
            )
        return False

    def drop(self, replica: Any, trace: Any) -> None:
        """Forget what was unscaled here: it is applied."""
        self._marks = [mark for mark in self._marks if mark[:2] != (replica, trace)]

    def _number(self, replica: Any, trace: Any) -> int | None:
        return next((mark[2] for mark in self._marks if mark[:2] == (replica, trace)), None)

    def clear(self) -> None:
        """Forget everything."""
        self._marks.clear()


def number_of(grads: Sequence[Any]) -> int:
    """Return how many gradients there are, None left out: loops drop those in between."""
    return sum(g is not None for g in grads)


def _is_gone(trace: Any) -> bool:
    return isinstance(trace, weakref.ref) and trace() is None


class UnscalingByHand:
    """What `LossScaleOptimizer` offers to loops that unscale before they apply.

    Attributes:
        schedule: The `LossScale` in use.
        dynamic_scale: The current scale (after `build`).
        built: Whether there is a state.
    """

    schedule: LossScale
    dynamic_scale: Any
    built: bool
    _unscaled: UnscaledMarks
    _losses: LossNotes
    _trainable_variables: Sequence[Any]

    def scale_loss(self, loss: Any) -> Any:
        """Return `loss` times the current scale."""
        raise NotImplementedError

    def _scale_here(self, what: str) -> Any:
        """Return the scale as code that may be traced sees it.

        Args:
            what: Who asks, for the message.

        Raises:
            LossScaleError: If the trace would keep it for ever.
        """
        scale = self.dynamic_scale.value if self.built else self.schedule.initial_scale
        refuse_baking(
            scale,
            what,
            "Call optimizer.build(model.trainable_variables) before tracing, and scale and unscale "
            "within `keras.StatelessScope(list(zip(optimizer.variables, values)))`.",
        )
        return scale

    def get_scaled_loss(self, loss: Any) -> Any:
        """Return the loss times the scale, as in Keras 2; new code calls `scale_loss`.

        Args:
            loss: As for `scale_loss`, or a function that returns it.

        Returns:
            The scaled loss in float32, or a function that returns it.
        """
        if callable(loss):
            return lambda: self.scale_loss(loss())
        return self.scale_loss(loss)

    def get_unscaled_gradients(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None
    ) -> list[Any]:
        """Return the gradients divided by the scale; the next `apply` leaves that out.

        For loops from Keras 2, and for those that clip or look at gradients before they apply them.
        As PyTorch's `GradScaler.unscale_`, it is called once for each `apply`, in the same traced
        function. An inf or NaN stays one, and the step is skipped.

        Args:
            grads: Gradients of the scaled loss, None among them or not, in the order of the
                variables.
            trainable_variables: The variables that `grads` belong to. Needed only where some have
                `overwrite_with_gradient`, whose gradients are left as they are: before `build`,
                when nothing tells, and for a part of the variables.

        Returns:
            The gradients in float32, sparse ones still sparse.

        Raises:
            LossScaleError: If it was called before without an `apply` in between, or it cannot
                know the variables where that matters. Also while JAX traces a step, outside a
                `keras.StatelessScope` that holds `variables`.
        """
        grads = list(grads)
        scale = self._scale_here("get_unscaled_gradients")
        variables = self._belonging_to(grads, trainable_variables)
        replica, trace = backend.current().place()
        self._unscaled.set(replica, trace, number_of(grads))
        return [divided(g, v, scale) for g, v in zip(grads, variables, strict=True)]

    def _belonging_to(self, grads: list[Any], variables: Sequence[Any] | None) -> list[Any]:
        """Return a variable for each gradient; None where it is not known or does not matter."""
        known = self._trainable_variables if self.built else ()
        given = list(known if variables is None else variables)
        if len(given) == len(grads):
            return given
        if variables is not None or any(takes_gradient_as_value(v) for v in known):
            raise LossScaleError(
                "Which gradients are to be unscaled, and which are new values, cannot be known.",
                received=f"{len(grads)} gradients for {len(given)} variables",
                expected="one gradient, or None, for each variable",
                fix="Call get_unscaled_gradients(grads, variables).",
            )
        return [None] * len(grads)

    def forget_unscaled(self) -> None:
        """Forget gradients that were unscaled, and losses that were noted, for a step not taken."""
        self._unscaled.clear()
        self._losses.clear()
