"""Remembers the steps of a walk, for the walk backwards, and what their tensors look like."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from kerasmp.probe.arrays import is_float, to_numpy
from kerasmp.probe.magnitudes import Magnitudes, magnitudes
from kerasmp.probe.values import values_in

if TYPE_CHECKING:
    from kerasmp.probe.compare import Comparison
    from kerasmp.probe.values import Value


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """A tensor of one step, in half precision beside float32.

    Attributes:
        place: The path of the layer or variable, or the name of the operation after that of its
            model.
        direction: "forward" for what a step returns; "backward" for the gradients that it returns
            for its inputs; "weights" for the gradient of a variable.
        dtype: The dtype in which the step computes.
        magnitudes: The magnitudes in float32, gradients at the loss scale.
        flushed: The share of numbers that are 0 in half precision, of those that are not in
            float32.
        high: The share above half of the largest number of `dtype`.
        nonfinite: The share of inf and NaN in half precision.
        nonfinite_in_float32: The same in float32.
        error: The error relative to float32: the root mean square along the last axis, at the
            worst position.
        began_here: How much of the error this step adds. Where the error is suspicious, the step
            ran again alone, on inputs that are rounded in both runs; elsewhere it is what exceeds
            the error of the inputs.
    """

    place: str
    direction: str
    dtype: str
    magnitudes: Magnitudes
    flushed: float
    high: float
    nonfinite: float
    nonfinite_in_float32: float
    error: float
    began_here: float


def look(  # noqa: PLR0913, PLR0917 - a tensor, and what is known about it
    place: str, direction: str, dtype: str, half: Any, wide: Any, seen: Comparison, began: float
) -> TensorSummary:
    """Return what a tensor looks like in both runs.

    Args:
        place: Its place; see `TensorSummary`, also for the next two.
        direction: Its direction.
        dtype: The dtype in which it was computed.
        half: The tensor in half precision.
        wide: The tensor in float32.
        seen: The comparison of both.
        began: See `TensorSummary.began_here`.
    """
    array = to_numpy(wide)
    found = magnitudes(array)
    size, lost = max(found.size, 1), found.nonfinite
    if half is not wide:
        lost = found.size - int(np.count_nonzero(np.isfinite(to_numpy(half))))
    return TensorSummary(
        place,
        direction,
        dtype,
        found,
        seen.flushed / max(seen.nonzero, 1),
        found.high(dtype),
        lost / size,
        found.nonfinite / size,
        seen.error,
        began,
    )


class Step(NamedTuple):
    """A call of a layer or operation, as it ran in both runs.

    Attributes:
        place: Its place.
        operation: The layer or operation.
        args: Its positional arguments, values in any structure.
        kwargs: Its keyword arguments, likewise.
        graph: The graph that the operation is a node of, or None.
        reads: The dtype in which operations read variables, or None.
        outputs: What it returned, values in any structure.
        kind: "both" runs count; or only "float32", since half precision fails, is wrong, or draws
            other random numbers; or it is the "cast" of a value to another dtype.
        dtype: The dtype in which it computes.
        adds_losses: Whether it calls `add_loss`.
    """

    place: str
    operation: Any
    args: Any
    kwargs: Any
    graph: Any = None
    reads: str | None = None
    outputs: Any = None
    kind: str = "both"
    dtype: str = "float32"
    adds_losses: bool = False

    @property
    def given(self) -> list[Value]:
        """The values among the arguments."""
        return values_in((self.args, self.kwargs))

    @property
    def weights(self) -> list[Any]:
        """The trainable variables that the step reads."""
        if self.kind == "cast":
            return []
        if isinstance(self.operation, keras.Layer):
            return list(self.operation.trainable_variables)
        held = [self.args, self.kwargs, getattr(self.operation, "weights", [])]
        variables = [v for v in keras.tree.flatten(held) if isinstance(v, keras.Variable)]
        return [v for v in {id(v): v for v in variables}.values() if v.trainable]


class Tape:
    """The steps of a walk on which weights have an influence, and all its tensors."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.tensors: list[TensorSummary] = []
        self.lost_masks: list[str] = []
        """The places of layers that are given a mask, and do not hand it on."""
        self.is_paused = False
        """Whether steps are only looked at, since the step around them is recorded as a whole."""
        self._differentiable: set[int] = set()  # ids of values, which the steps keep

    def record(self, step: Step) -> None:
        """Remember a step if weights have an influence on what it returns."""
        if not self.is_paused and (step.weights or any(map(self.has_gradient, step.given))):
            self.steps.append(step)
            self._differentiable |= {id(v) for v in values_in(step.outputs) if is_float(v.wide)}

    def has_gradient(self, value: Value) -> bool:
        """Return whether weights have an influence on a value."""
        return id(value) in self._differentiable

    def mark(self) -> tuple[int, int]:
        """Return the present length, for `rewind`."""
        return len(self.steps), len(self.tensors)

    def rewind(self, mark: tuple[int, int]) -> None:
        """Forget what came after a mark."""
        del self.steps[mark[0] :], self.tensors[mark[1] :]
