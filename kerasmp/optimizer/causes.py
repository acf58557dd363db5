"""Why a step was skipped, as far as the finiteness of its loss tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from keras import ops

if TYPE_CHECKING:
    from collections.abc import Sequence

# In the order of the counts that the optimizer keeps.
CAUSES = ("loss", "gradients", "floor", "unknown")


def cause_of(loss_finite: Any, scale: Any, min_scale: float) -> Any:
    """Return the cause of a skipped step, as a position in `CAUSES`.

    - "loss": the loss itself was inf or NaN. No scale helps: the forward pass, the labels or the
      data are to blame.
    - "gradients": the loss was finite and a gradient was not; the scale is presumed too high.
    - "floor": the same, but the scale can sink no further: an operation's gradient is NaN, or
      gradients lie beyond float16.
    - "unknown": nobody knows what the loss was.

    Args:
        loss_finite: Scalar bool tensor, or None if not known.
        scale: The scale of the step.
        min_scale: The smallest scale of the schedule.
    """
    if loss_finite is None:
        return ops.full((), CAUSES.index("unknown"), dtype="int32")
    with_finite_loss = ops.where(
        ops.convert_to_tensor(scale) > min_scale, CAUSES.index("gradients"), CAUSES.index("floor")
    )
    return ops.where(loss_finite, with_finite_loss, CAUSES.index("loss"))


# So many losses of one step are held as they are.
_HELD = 16


class Forgetful:
    """Holds what belongs to one moment of one process: a copy of it is empty."""

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Copy and pickle as a new one."""
        return type(self), ()


def all_finite(losses: Sequence[Any]) -> Any:
    """Return whether nothing in any of these tensors is inf or NaN, as a scalar bool tensor."""
    return ops.all(ops.stack([ops.all(ops.isfinite(loss)) for loss in losses]))


class LossNotes(Forgetful):
    """The losses of the step that is under way.

    The tensors themselves: a step that is fine need not look at them.

    A note is taken by the `apply` of the same replica and the same trace; any other would read a
    tensor of a graph that is not its own.
    """

    def __init__(self) -> None:
        self._notes: dict[Any, tuple[Any, list[Any]]] = {}

    def add(self, replica: Any, trace: Any, loss: Any) -> None:
        """Note a loss.

        Args:
            replica: What tells replicas apart that run the same code.
            trace: What is equal within one trace only; None outside of any.
            loss: Tensor of any shape.
        """
        known_trace, losses = self._notes.get(replica, (None, []))
        if known_trace != trace:
            losses = []
        elif len(losses) == _HELD:  # a loop that scales losses and never applies a gradient
            losses = [ops.where(all_finite(losses), 0.0, float("nan"))]
        self._notes[replica] = (trace, [*losses, loss])

    def take(self, replica: Any, trace: Any) -> list[Any]:
        """Return the losses noted here, each once."""
        known_trace, losses = self._notes.pop(replica, (None, []))
        return losses if known_trace == trace else []

    def clear(self) -> None:
        """Forget everything."""
        self._notes.clear()
