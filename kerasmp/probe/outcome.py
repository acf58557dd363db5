"""What a step returned in both runs, and what further runs of it show."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.keras_internals import mask_of
from kerasmp.probe.arrays import compare_tensors, to_numpy
from kerasmp.probe.compare import Comparison
from kerasmp.probe.judge import Verdict, is_at_fault, judge
from kerasmp.probe.remedies import mends, of_layer, of_operation
from kerasmp.probe.values import Trouble, troubles_of_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.probe.steps import Runner
    from kerasmp.probe.tape import Step


class Outcome:
    """What a step returned in both runs.

    Args:
        runner: What ran it.
        step: The step.
        half: What it returned under its policy.
        wide: What it returned in float32.
        earlier: The troubles that came with its inputs.
    """

    def __init__(
        self, runner: Runner, step: Step, half: Any, wide: Any, earlier: Sequence[Trouble]
    ) -> None:
        self.step = step
        self.wide = wide
        self.pairs = list(zip(keras.tree.flatten(half), keras.tree.flatten(wide), strict=True))
        self.earlier = tuple(earlier)
        self.merged = tuple(trouble for trouble in earlier if trouble.kind == "merged")
        self._runner = runner
        self._error = max((value.error for value in step.given), default=0.0)
        self._again: dict[bool, list[Any]] = {}
        self._alone: dict[int, float] = {}  # the step's own error, by output

    def judge(self, index: int) -> tuple[Verdict, Comparison, Comparison]:
        """Return the verdict about an output, what shows it, and the comparison of both runs."""
        seen = compare_tensors(*self.pairs[index])
        own = functools.partial(self._own, index)
        pending = len(self.earlier) > len(self.merged)
        found = judge(seen, own, self._error, self.step.dtype, has_troubles=pending)
        return *found, seen

    def began_here(self, index: int, seen: Comparison) -> float:
        """Return the error that the step adds to an output."""
        return self._alone.get(index, max(0.0, seen.error - self._error))

    def masks(self, index: int) -> Comparison:
        """Compare the masks of an output; equal if one has none."""
        masks = [mask_of(each) for each in self.pairs[index]]
        return Comparison() if any(mask is None for mask in masks) else compare_tensors(*masks)

    def _own(self, index: int) -> Comparison:
        """Compare an output with that of the step in float32 on the same rounded inputs."""
        half, _ = self.pairs[index]
        found = []
        for every in (False, True):  # some layers round weights themselves
            found.append(compare_tensors(half, self._run_again(every=every)[index]))
            if not is_at_fault(found[-1], self.step.dtype):
                break
        best = min(found, key=lambda each: each.error)
        self._alone[index] = best.error
        return best

    def _run_again(self, *, every: bool) -> list[Any]:
        if every not in self._again:
            step = self.step
            outputs = self._runner.again(step.operation, step.args, step.kwargs, every=every)
            self._again[every] = keras.tree.flatten(outputs)
        return self._again[every]

    @functools.cached_property
    def _all_repaired(self) -> list[Any]:
        step = self.step
        try:
            outputs = self._runner.wide(step.operation, step.args, step.kwargs, "repaired")
        except Exception:  # noqa: BLE001 - a layer may raise anything
            return [None] * len(self.pairs)
        return list(keras.tree.flatten(outputs))

    def repaired(self, index: int) -> Any:
        """Return an output if the step computes in float32, and the troubled ones before it."""
        return self._all_repaired[index]

    def is_repaired(self, index: int) -> bool:
        """Return whether that mends the output."""
        return mends(lambda: self.repaired(index), self.pairs[index][1], self.step.dtype)

    def differs_each_time(self) -> bool:
        """Return whether the step draws random numbers in a way that Keras does not know."""
        second, _ = self._runner.half(self.step.operation, self.step.args, self.step.kwargs)
        pairs = zip(self.pairs, keras.tree.flatten(second), strict=True)
        seen = [compare_tensors(one, b) for (one, _), b in pairs if keras.ops.is_tensor(b)]
        return any(each.error or each.differing for each in seen)

    def trouble(self, kind: str, numbers: Any) -> Trouble:
        """Return what is wrong with the step, with the remedies that mend it.

        Args:
            kind: See `Trouble`.
            numbers: See `Trouble`.
        """
        step = self.step
        try:
            again = self._runner.again(step.operation, step.args, step.kwargs)
        except Exception:  # noqa: BLE001 - then float32 is no remedy
            again = None
        if isinstance(step.operation, keras.Layer):

            def run(layer: Any) -> Any:
                return self._runner.half(layer, step.args, step.kwargs)[0]

            found = of_layer(step.operation, step.place, run, again, self.wide)
        else:
            found = of_operation(step.graph, step.operation, step.given, again, self.wide)
        return Trouble(kind, step.place, step.operation, step.dtype, numbers, tuple(found))

    def trouble_of_input(self, numbers: Comparison) -> Trouble | None:
        """Return the trouble of an input outside the range whose values the step hands on."""
        step = self.step
        is_input = len(step.given) == 1 and step.given[0].exact and step.given[0].source is not None
        if not is_input or not np.any(to_numpy(step.given[0].wide) == numbers.worst[1]):
            return None
        [value] = step.given
        found = troubles_of_data(value, str(value.source), step.operation, step.dtype)
        return next((trouble for trouble in found if trouble.kind == "range"), None)
