"""What belongs to pending steps: noted losses, marks of unscaled gradients, compiled steps."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.optimizer.step import all_finite
from kerasmp.optimizer.step_cache import StepCache

if TYPE_CHECKING:
    from collections.abc import Sequence

# At most so many losses of one step are kept as separate tensors.
_MAX_LOSSES = 16


class Pending:
    """What an optimizer keeps for pending steps. It is not part of the optimizer's state.

    The methods of `losses` and `unscaled` take the replica and the trace that
    `Backend.trace_context` returns.

    Attributes:
        losses: The losses that were noted for the next step.
        unscaled: Where `get_unscaled_gradients` was called and `apply` was not yet.
        compiled: The steps that JAX has compiled.
    """

    def __init__(self) -> None:
        self.losses = LossNotes()
        self.unscaled = UnscaledMarks()
        self.compiled = StepCache()

    def __reduce__(self) -> tuple[type[Pending], tuple[()]]:
        """Copy and pickle as a new object, since what is pending belongs to this process."""
        return type(self), ()


class LossNotes:
    """The losses of the pending step, as tensors, since a good step need not look at them.

    Only an `apply` in the same replica and the same trace gets them. Another one would read a
    tensor from the graph of another function.
    """

    def __init__(self) -> None:
        self._notes: dict[Any, tuple[Any, list[Any]]] = {}

    def add(self, replica: Any, trace: Any, loss: Any) -> None:
        """Note a loss, a tensor of any shape."""
        noted_trace, losses = self._notes.get(replica, (None, []))
        if noted_trace != trace:
            losses = []
        elif len(losses) == _MAX_LOSSES:  # a loop that scales losses and never applies gradients
            losses = [ops.where(all_finite(losses), 0.0, float("nan"))]
        self._notes[replica] = (trace, [*losses, loss])

    def pop(self, replica: Any, trace: Any) -> list[Any]:
        """Return the losses that were noted here, and forget them."""
        noted_trace, losses = self._notes.pop(replica, (None, []))
        return losses if noted_trace == trace else []

    def clear(self) -> None:
        """Forget all losses."""
        self._notes.clear()


class UnscaledMarks:
    """Where `get_unscaled_gradients` was called without `apply` yet, and for how many gradients.

    `apply` must follow in the same replica and the same trace. A traced function runs again
    without this Python code, so a mark that it set or removed would be missing in its next call.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[Any, Any, int]] = []

    def add(self, replica: Any, trace: Any, grads: Sequence[Any]) -> None:
        """Mark gradients as unscaled, unless all of them are None.

        Raises:
            LossScaleError: If there is a mark already.
        """
        if self._number(replica, trace) is not None:
            raise LossScaleError(
                "Gradients would be unscaled twice, which would shrink the update by the scale.",
                received="a second call of get_unscaled_gradients before apply",
                expected="one call for each apply",
                fix="Apply the gradients of the first call, or discard them with "
                "optimizer.forget_unscaled().",
            )
        if number := _count(grads):
            self._marks.append((replica, trace, number))

    def check(self, replica: Any, trace: Any, grads: Sequence[Any]) -> bool:
        """Return whether the gradients that are about to be applied are unscaled already.

        Raises:
            LossScaleError: If gradients of this replica are unscaled, but in another trace, or
                another number of them.
        """
        unscaled, number = self._number(replica, trace), _count(grads)
        if unscaled not in {None, number}:
            raise LossScaleError(
                "apply cannot know which of its gradients are unscaled.",
                received=f"{number} gradients (None not counted), although "
                f"get_unscaled_gradients returned {unscaled}",
                expected="all of them in one call of apply",
                fix="Unscale only the gradients that you apply, and apply them in one call. If "
                "the unscaled gradients should not be applied, call optimizer.forget_unscaled().",
            )
        if unscaled is not None:
            return True
        # If a trace failed between the two calls, its mark means nothing.
        self._marks = [mark for mark in self._marks if not _is_gone(mark[1])]
        # The replica is None outside of all replicas; the gradients of any of them may be meant.
        if any(None in {other, replica} or other == replica for other, _, _ in self._marks):
            raise LossScaleError(
                "apply cannot know whether its gradients are unscaled.",
                received="get_unscaled_gradients and apply in different traced functions, or one "
                "of them outside of strategy.run",
                expected="both in one function, or both outside of any",
                fix="Move the two calls together. If the unscaled gradients should not be applied, "
                "or the function failed between the two calls, call optimizer.forget_unscaled().",
            )
        return False

    def remove(self, replica: Any, trace: Any) -> None:
        """Remove the mark of the gradients that are applied here."""
        self._marks = [mark for mark in self._marks if mark[:2] != (replica, trace)]

    def clear(self) -> None:
        """Remove all marks."""
        self._marks.clear()

    def _number(self, replica: Any, trace: Any) -> int | None:
        return next((mark[2] for mark in self._marks if mark[:2] == (replica, trace)), None)


def _count(grads: Sequence[Any]) -> int:
    """Return the number of gradients without None, which some loops drop before they apply."""
    return sum(g is not None for g in grads)


def _is_gone(trace: Any) -> bool:
    return isinstance(trace, weakref.ref) and trace() is None
