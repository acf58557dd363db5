"""Takes the steps of a walk backwards, in half precision and in float32, and compares gradients."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from kerasmp.backend import current
from kerasmp.probe.arrays import compare_tensors, is_float, to_numpy, widen
from kerasmp.probe.compare import EPSILON, Comparison
from kerasmp.probe.judge import FAULT, Verdict, judge
from kerasmp.probe.remedies import CAST, mends, of_layer
from kerasmp.probe.tape import look
from kerasmp.probe.values import Trouble, follow, values_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kerasmp.probe.steps import Runner
    from kerasmp.probe.tape import Step, Tape
    from kerasmp.probe.values import Value

# A gradient is less accurate than rounded inputs explain if its error is so many times theirs.
_AMPLIFIED = 4
# What gradients are multiplied by to see whether they are finite at a lower loss scale.
_LOWER = 2.0**-40


class Gradient(NamedTuple):
    """The gradient of a tensor in both runs.

    Attributes:
        half: Under the model's policies.
        wide: In float32.
        error: The relative error of `half`.
        troubles: What steps before it, from the loss, have done that may show later.
        by_logits: Whether it is that of the logits of probabilities, from which a loss in float32
            is computed.
    """

    half: Any
    wide: Any
    error: float = 0.0
    troubles: tuple[Trouble, ...] = ()
    by_logits: bool = False


def backward(
    runner: Runner, tape: Tape, gradients: Mapping[int, Gradient], scale: float
) -> tuple[list[Trouble], dict[int, Any]]:
    """Take the steps of a tape backwards, and forget them.

    Args:
        runner: What ran them.
        tape: The tape. What gradients look like is added to its tensors.
        gradients: Gradients of values, by the ids of the values.
        scale: The loss scale, by which all gradients are multiplied.

    Returns:
        The troubles, from the loss to the inputs, and the gradient of each variable in float32, by
        the id of the variable.
    """
    walk = _Backward(runner, tape, gradients, scale)
    while tape.steps:
        walk.take(tape.steps.pop())
    walk.finish()
    return walk.troubles, {key: gradient.wide for key, (_, gradient) in walk.weights.items()}


class _Backward:
    def __init__(
        self, runner: Runner, tape: Tape, gradients: Mapping[int, Gradient], scale: float
    ) -> None:
        self.troubles: list[Trouble] = []
        self.weights: dict[int, tuple[Any, Gradient]] = {}
        self._runner = runner
        self._tape = tape
        self._known = {(key, False): gradient for key, gradient in gradients.items()}
        self._scale = scale
        self._rows: dict[int, int] = {}  # where on the tape the gradient of a variable is
        self._shared: dict[int, str] = {}  # the dtypes of variables that several steps read

    def take(self, step: Step) -> None:
        """Compute the gradients that a step returns for its inputs and weights."""
        outputs = [value for value in values_in(step.outputs) if is_float(value.wide)]
        ends = [
            (i, by_logits)
            for i, value in enumerate(outputs)
            for by_logits in (False, True)
            if (id(value), by_logits) in self._known
        ]
        given = [self._known.pop((id(outputs[i]), by_logits)) for i, by_logits in ends]
        inputs = list({id(v): v for v in step.given if self._tape.has_gradient(v)}.values())
        if not (given or step.adds_losses) or not (inputs or step.weights):
            return
        if step.kind == "cast":
            for gradient in given:
                self._add(inputs[0], gradient)
            return
        found = _Gradients(self._runner, step, inputs, (ends, given), self._scale)
        if found.failure is not None:
            self._report(_trouble("fails", step, found.failure))
        for index, end in enumerate([*inputs, *step.weights]):
            if found.half[index] is not None and found.wide[index] is not None:
                self._add(end, self._judge(found, index, end))

    def finish(self) -> None:
        """Report what the gradients of variables show."""
        for key, (variable, gradient) in self.weights.items():
            for each in gradient.troubles:
                self._report(each, variable.path)
            if key in self._shared:
                tensors, row = self._tape.tensors, self._rows[key]
                half, wide, dtype = gradient.half, gradient.wide, self._shared[key]
                seen = compare_tensors(half, wide, dtype)
                began = tensors[row].began_here
                tensors[row] = look(variable.path, "weights", dtype, half, wide, seen, began)

    def _judge(self, found: _Gradients, index: int, end: Any) -> Gradient:
        """Report what is wrong with a gradient for a value or a weight."""
        step, is_weight = found.step, isinstance(end, keras.Variable)
        place = end.path if is_weight else step.place
        direction = "weights" if is_weight else "backward"
        half, wide = (current().dense_values(g[index]) for g in (found.half, found.wide))
        verdict, numbers, seen = found.judge(index)
        began = found.began_here(index, seen)
        if id(end) in self._rows:
            self._shared[id(end)] = step.dtype
        else:
            if is_weight:
                self._rows[id(end)] = len(self._tape.tensors)
            self._tape.tensors.append(look(place, direction, step.dtype, half, wide, seen, began))
        by_logits = index in found.by_logits
        own = Gradient(found.half[index], found.wide[index], seen.error, by_logits=by_logits)
        # What rounding of its inputs explains is no fault of a gradient.
        if verdict is Verdict.FINE or (verdict is Verdict.SENSITIVE and not seen.nonfinite):
            return own
        if verdict is Verdict.CARRY:
            return own._replace(troubles=found.earlier)
        if verdict is Verdict.EARLIER:
            troubles = found.earlier
        else:
            now = _trouble(found.kind(index, verdict), step, numbers, found.remedies(index, end))
            if now.kind == Verdict.UNDERFLOW.value:  # it may not matter
                return own._replace(troubles=(now, *found.earlier))
            troubles = (now,)
        for each in troubles:
            self._report(each, place)
        if is_weight:
            return own._replace(error=0.0)
        return _follow(end, wide, troubles)._replace(by_logits=by_logits)

    def _add(self, end: Any, gradient: Gradient) -> None:
        """Add a gradient to the others of a value or variable."""
        is_weight, key = isinstance(end, keras.Variable), (id(end), gradient.by_logits)
        before = self.weights.get(id(end), (end, None))[1] if is_weight else self._known.get(key)
        if before is not None:
            gradient = Gradient(
                _sum(before.half, gradient.half),
                _sum(before.wide, gradient.wide),
                max(before.error, gradient.error),
                tuple(dict.fromkeys([*before.troubles, *gradient.troubles])),
                gradient.by_logits,
            )
        if is_weight:
            self.weights[id(end)] = end, gradient
        else:
            half = keras.ops.cast(gradient.half, end.half.dtype)
            self._known[key] = gradient._replace(half=half)

    def _report(self, trouble: Trouble, until: str | None = None) -> None:
        """Add a trouble, unless its step has one already."""
        if any(each.operation is trouble.operation for each in self.troubles):
            return
        if until != trouble.place:
            trouble.until = until
        self.troubles.append(trouble)


class _Gradients:
    """The gradients of a step for its inputs and weights, in both runs.

    Args:
        runner: Runs the step.
        step: The step.
        inputs: The values to differentiate by.
        given: Which outputs have gradients, as for `Runner.gradients`, and these.
        scale: The loss scale.
    """

    def __init__(
        self,
        runner: Runner,
        step: Step,
        inputs: Sequence[Value],
        given: tuple[Sequence[tuple[int, bool]], Sequence[Gradient]],
        scale: float,
    ) -> None:
        self.step = step
        self._inputs = inputs
        ends, gradients = given
        self.earlier = tuple(dict.fromkeys(x for each in gradients for x in each.troubles))
        self._error = max((each.error for each in gradients), default=0.0)
        self.by_logits: set[int] = set()  # those that are by logits, see `Gradient`
        self._gradients = functools.partial(
            runner.gradients, step, inputs, of_losses=scale, ends=ends
        )
        self._halves = [each.half for each in gradients]
        self._alone: dict[int, float] = {}
        self.wide = self.half = self._run([each.wide for each in gradients], "wide")
        self.failure: Exception | None = None
        if step.kind == "both":
            try:
                self.half = self._in_half()
            except Exception as error:  # noqa: BLE001 - a layer may raise anything
                self.failure = error

    def _run(self, given: Sequence[Any], run: str, *, rounded: bool = False) -> list[Any]:
        found, self.by_logits = self._gradients(given, run, rounded=rounded)
        return found

    def _in_half(self, factor: float = 1.0) -> list[Any]:
        return self._run([each * factor for each in self._halves], "half")

    @functools.cached_property
    def _again(self) -> list[Any]:
        """The gradients in float32, of inputs and gradients as half precision rounds them."""
        return self._run([widen(each) for each in self._halves], "wide", rounded=True)

    def _compare(self, index: int, wide: Any) -> Comparison:
        values = current().dense_values
        return compare_tensors(values(self.half[index]), values(wide), self.step.dtype)

    def judge(self, index: int) -> tuple[Verdict, Comparison, Comparison]:
        """Return the verdict about a gradient, what shows it, and the comparison of both runs."""
        if self.half is self.wide:
            return Verdict.FINE, Comparison(), Comparison()
        seen = self._compare(index, self.wide[index])

        def own() -> Comparison:
            alone = self._compare(index, self._again[index])
            self._alone[index] = alone.error
            return alone

        has_troubles = bool(self.earlier)
        found = judge(seen, own, self._error, self.step.dtype, has_troubles=has_troubles)
        if found[0] is Verdict.ERROR and self._is_ill_conditioned(index, found[1]):
            return Verdict.FINE, found[1], seen
        return *found, seen

    def _is_ill_conditioned(self, index: int, alone: Comparison) -> bool:
        """Return whether the relative error of a gradient says nothing.

        So it is with sums that are 0 but for rounding, such as the gradient of a bias before a
        normalization, or of the bias of an attention's keys. Rounding the inputs changes it as
        much, or its error is small beside the gradients of the layer's other weights.
        """
        values, dtype = current().dense_values, self.step.dtype
        again, wide = values(self._again[index]), values(self.wide[index])
        if alone.error <= _AMPLIFIED * compare_tensors(again, wide, dtype).error:
            return True
        weights = self.wide[len(self._inputs) :]
        if index < len(self._inputs) or len(weights) == 1:
            return False
        largest = max(np.max(np.abs(to_numpy(values(w)))) for w in weights if w is not None)
        half, exact = alone.worst
        return bool(abs(half - exact) <= FAULT * EPSILON[dtype] * largest)

    def began_here(self, index: int, seen: Comparison) -> float:
        """Return the error that the step adds to a gradient."""
        return self._alone.get(index, max(0.0, seen.error - self._error))

    def kind(self, index: int, verdict: Verdict) -> str:
        """Return the kind of trouble that a verdict is about."""
        numbers = self._compare(index, self._again[index])
        if verdict is Verdict.ERROR and 2 * numbers.flushed > numbers.nonzero:
            verdict = Verdict.UNDERFLOW  # zeros are also a large error
        elif verdict is Verdict.BROKEN:
            try:
                lower = current().dense_values(self._in_half(_LOWER)[index])
            except Exception:  # noqa: BLE001 - a layer may raise anything
                return str(verdict.value)
            if np.all(np.isfinite(to_numpy(lower))):
                verdict = Verdict.OVERFLOW  # of a sum on the way
        return str(verdict.value)

    def remedies(self, index: int, end: Any) -> tuple[str, ...]:
        """Return what mends a gradient for a value or a weight."""
        values, operation = current().dense_values, self.step.operation
        again, wide = values(self._again[index]), values(self.wide[index])
        if isinstance(operation, keras.Layer):
            holds = not isinstance(end, keras.Variable)

            def run(_: Any) -> Any:
                return values(self._in_half()[index])

            return tuple(of_layer(operation, self.step.place, run, again, wide, holds=holds))
        return (CAST,) if mends(lambda: again, wide, self.step.dtype) else ()


def _trouble(kind: str, step: Step, numbers: Any, remedies: tuple[str, ...] = ()) -> Trouble:
    return Trouble(kind, step.place, step.operation, step.dtype, numbers, remedies)


def _follow(value: Value, wide: Any, troubles: tuple[Trouble, ...] = ()) -> Gradient:
    """Return float32's gradient as that of both runs."""
    followed = follow(value.half, wide, troubles)
    return Gradient(followed.half, followed.wide, 0.0, followed.troubles)


def _sum(one: Any, other: Any) -> Any:
    """Add two gradients; sparse ones become dense."""
    return keras.ops.add(*map(current().to_dense, (one, other)))
