"""Division by the scale, and loops that do it by hand before they apply the gradients."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from kerasmp import backend
from kerasmp.errors import LossScaleError
from kerasmp.optimizer.causes import Forgetful

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    framework = backend.current()
    return framework.with_values(
        gradient, framework.quotient(framework.dense_values(gradient), scale)
    )


def refuse_jit_constant(value: Any, what: str, fix: str) -> None:
    """Raise if a function that JAX traces here would keep `value` for all its calls.

    Args:
        value: What is read of the optimizer's state.
        what: Who reads it, for the message.
        fix: How to mend it.

    Raises:
        LossScaleError: In a traced function that `value` is no argument of.
    """
    if backend.current().is_jit_constant(value):
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


def belonging_to(
    grads: Sequence[Any], given: Sequence[Any] | None, known: Sequence[Any]
) -> list[Any]:
    """Return a variable for each gradient; None where it is not known or does not matter.

    Args:
        grads: The gradients.
        given: The variables that a caller named, or None.
        known: Those that the optimizer was built with.

    Raises:
        LossScaleError: If it is not known and does matter.
    """
    variables = list(known if given is None else given)
    if len(variables) == len(grads):
        return variables
    if given is not None or any(takes_gradient_as_value(v) for v in known):
        raise LossScaleError(
            "Which gradients are to be unscaled, and which are new values, cannot be known.",
            received=f"{len(grads)} gradients for {len(variables)} variables",
            expected="one gradient, or None, for each variable",
            fix="Call get_unscaled_gradients(grads, variables).",
        )
    return [None] * len(grads)
