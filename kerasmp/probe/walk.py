"""Runs a model under its policy and in float32, step by step, and compares what each step returns.

A step is a call of a layer, or of an operation in a graph. Both runs go side by side through the
graph, so that no more than two copies of a tensor are alive. Where they differ by more than
rounding explains, the step runs once more: in float32, on inputs and weights as half precision
rounds them. This tells whether the step itself is at fault, or what came before it. Both runs go on
with float32's values, so that each step is judged by itself.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.keras_graph import (
    calls,
    graph_of,
    has_own_call,
    mask_operations,
    trace_graph,
)
from kerasmp.backend.keras_internals import (
    flatten_layers,
    mask_of,
    preserve_global_seed,
    unfiltered_tracebacks,
)
from kerasmp.backend.layer_calls import takes_training, watch_calls
from kerasmp.policy.locations import paths
from kerasmp.probe.arrays import is_float, widen
from kerasmp.probe.compare import Comparison
from kerasmp.probe.judge import Verdict
from kerasmp.probe.outcome import Outcome
from kerasmp.probe.remedies import float32_until, of_layer
from kerasmp.probe.steps import (
    Runner,
    cast_dtype,
    draws,
    half_dtype,
    halves,
    has_weights,
    is_container,
    is_user_defined,
    rounds_to,
)
from kerasmp.probe.tape import Step, Tape, look
from kerasmp.probe.values import (
    OF_DATA,
    Trouble,
    Value,
    batch_values,
    cast_value,
    follow,
    graph_values,
    pair,
    same,
    side,
    troubles_of_data,
    values_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kerasmp.backend.layer_calls import Watcher


def probe(model: Any, x: Any, state: Sequence[tuple[Any, Any]] = ()) -> list[Trouble]:
    """Pass a batch through a model, and return what half precision does to its values.

    No variable changes, and no seed. The caller restores what else calls leave in layers.

    Args:
        model: A built model.
        x: The batch, in the structure that the model takes.
        state: Pairs of variables and values, if the variables do not hold their values.

    Returns:
        The troubles, in the order of the steps.
    """
    with preserve_global_seed() as seed, unfiltered_tracebacks(), np.errstate(over="ignore"):
        walk = Walk(model, Runner(model, seed, state))
        walk.run(model, x)
    return walk.troubles


class Walk:
    """Passes a batch through a model in both runs.

    Args:
        model: A built model.
        runner: Runs its steps.
        tape: Remembers the steps, if they are to be taken backwards, too.
    """

    def __init__(self, model: Any, runner: Runner, tape: Tape | None = None) -> None:
        self.troubles: list[Trouble] = []
        self.runner = runner
        self._tape = tape
        # What computes the mask of a Masking in a graph; the layer itself is judged.
        self._of_masks = {
            id(operation)
            for layer in flatten_layers(model)
            for _, operation in mask_operations(layer)
        }
        self._paths = {id(layer): path for layer, path in paths(model)}
        self._path: tuple[str, ...] = ()  # the models around the step, for names of operations
        self._graph: Any = None
        # For data and the dtype to which it is rounded: the tensor, so that its id stays its own,
        # and its troubles.
        self._of_data: dict[tuple[int, str], tuple[Any, list[Trouble]]] = {}
        # Troubles that layers inside a user-defined layer have returned, with the tensor.
        self._returned: dict[int, tuple[Any, tuple[Trouble, ...]]] = {}

    def run(self, model: Any, x: Any) -> Any:
        """Pass a batch through the model, and return its outputs as values."""
        graph = graph_of(model)
        if graph is not None and not has_own_call(model):
            outputs = self._run_graph(graph, graph_values(graph, x))
        else:
            outputs = self._step(model, (batch_values(x),), {})
        for value in values_in(outputs):
            for trouble in value.troubles:
                self._report(trouble)
        return outputs

    def has_gradient(self, value: Value) -> bool:
        """Return whether weights have an influence on a value."""
        return self._tape is not None and self._tape.has_gradient(value)

    def step(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Call a layer or operation on values, report what is wrong, and return values."""
        outputs = self._step(operation, args, kwargs)
        for value in values_in(outputs):
            for trouble in value.troubles:
                self._report(trouble)
        return outputs

    # ------------------------------------------------------------------------------- steps

    def _run_graph(self, graph: Any, inputs: Sequence[Value | None]) -> Any:
        """Run the steps of a graph, and forget each tensor after its last use."""
        outer, self._graph = self._graph, graph
        try:
            return self._run_steps(graph, inputs)
        finally:
            self._graph = outer

    def _run_steps(self, graph: Any, inputs: Sequence[Value | None]) -> Any:
        known = {id(symbol): value for symbol, value in zip(graph.inputs, inputs, strict=True)}
        steps = [call for call in calls(graph) if call.inputs]
        last = {id(symbol): i for i, step in enumerate(steps) for symbol in step.inputs}
        kept = {id(symbol) for symbol in graph.outputs}
        for index, step in enumerate(steps):
            args, kwargs = step.node.arguments.fill_in(known)
            outputs = keras.tree.flatten(self._step(step.operation, args, kwargs))
            known |= {id(s): value for s, value in zip(step.outputs, outputs, strict=True)}
            for symbol in step.inputs:
                if last[id(symbol)] == index and id(symbol) not in kept:
                    known.pop(id(symbol), None)
        return keras.tree.map_structure(lambda symbol: known[id(symbol)], graph.output)

    def _step(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Call a layer or operation on values, and return values."""
        given = values_in((args, kwargs))
        graph = graph_of(operation)
        if graph is not None and not has_own_call(operation):
            self._path = (*self._path, operation.name)
            try:
                return self._run_graph(graph, _in_order(graph, args, given))
            finally:
                self._path = self._path[:-1]
        if is_user_defined(operation):
            first = len(self.troubles)
            outputs = self._trace(operation, args, kwargs)
            if outputs is not None:
                self._check_mask(operation, given, outputs)
                self._try_float32(operation, args, kwargs, outputs, self.troubles[first:])
                return outputs
        step = Step(self._place(operation), operation, args, kwargs, self._graph, self.runner.dtype)
        is_same = all(value.half is value.wide and not value.troubles for value in given)
        if is_same and not halves(operation) and cast_dtype(operation) is None:
            outputs, _ = self.runner.half(operation, args, kwargs)
            exact = all(value.exact for value in given) and not has_weights(operation)
            values = keras.tree.map_structure(lambda t: same(t, given, exact=exact), outputs)
            return self._record(step, values, "both")
        return self._compare(step, self._troubles_of_inputs(operation, given))

    def _compare(self, step: Step, earlier: list[Trouble]) -> Any:
        """Run a step both ways, and return its outputs as values."""
        operation, args, kwargs = step.operation, step.args, step.kwargs
        reported = len(self.troubles)
        watcher = self._watcher(operation) if is_container(operation) else None
        try:
            with self._inside(operation) if watcher else contextlib.nullcontext():
                half, is_random = self.runner.half(operation, args, kwargs, watcher)
        except Exception as error:  # noqa: BLE001 - a layer may raise anything
            wide = self.runner.wide(operation, args, kwargs)  # if this fails, the model is wrong
            step = step._replace(dtype=half_dtype(operation, step.given, wide))
            fails = Outcome(self.runner, step, wide, wide, ()).trouble("fails", error)
            for trouble in _pending(earlier) or [fails]:  # infinities make it fail
                self._report(trouble, step)
            return self._record(step, pair(follow, wide, wide), "float32")
        step = step._replace(dtype=half_dtype(operation, step.given, half))
        try:
            wide = self.runner.wide(operation, args, kwargs)
        except Exception:  # noqa: BLE001 - code that is written for half precision only
            return keras.tree.map_structure(self._value, half)
        # The layers in it have reported already.
        if is_random or len(self.troubles) > reported or id(operation) in self._of_masks:
            return self._record(step, pair(follow, half, wide), "float32" if is_random else "both")
        return self._judge(Outcome(self.runner, step, half, wide, earlier), half)

    def _trace(self, layer: Any, args: Any, kwargs: Any) -> Any:
        """Run what a user-defined layer calls, step by step; None if that cannot be traced."""
        given = values_in((args, kwargs))
        takes_mask = "mask" in inspect.signature(layer.call).parameters
        if takes_mask and any(mask_of(value.half) is not None for value in given):
            return None
        earlier = self._troubles_of_inputs(layer, given)
        # A layer in float32 widens what half precision gives it.
        dtype = str(layer.compute_dtype) if layer.autocast else None
        inputs = [cast_value(value, dtype, earlier) for value in given]
        cast = {id(one): other.half for one, other in zip(given, inputs, strict=True)}
        tensors = keras.tree.map_structure(lambda x: cast.get(id(x), x), (args, kwargs))
        if takes_training(layer):
            tensors[1].setdefault("training", self.runner.training)
        traced = trace_graph(layer, *tensors)
        return None if traced is None else self._run_traced(layer, traced, given, inputs)

    def _run_traced(
        self,
        layer: Any,
        traced: tuple[Any, list[Any]],
        given: Sequence[Value],
        inputs: Sequence[Value],
    ) -> Any:
        """Run the graph of a user-defined layer, step by step; None if that fails."""
        graph, of_masks = traced
        first, mark = len(self.troubles), self._tape.mark() if self._tape else (0, 0)
        for one, other in zip(given, inputs, strict=True):
            if one is not other and self._tape is not None:
                self._tape.record(Step("", layer, (one,), {}, outputs=other, kind="cast"))
        self._of_masks.update(map(id, of_masks))
        outer = self._path, self.runner.dtype
        self._path, self.runner.dtype = (self._place(layer),), str(layer.compute_dtype)
        try:
            outputs = self._run_graph(graph, inputs)
        except Exception:  # noqa: BLE001 - then the layer is called as a whole
            outputs = None
        self._path, self.runner.dtype = outer
        operations = [x for x in self.troubles[first:] if not isinstance(x.operation, keras.Layer)]
        if outputs is None or any(trouble.kind == "fails" for trouble in operations):
            del self.troubles[first:]
            if self._tape:
                self._tape.rewind(mark)
            return None
        return outputs

    def _try_float32(
        self, layer: Any, args: Any, kwargs: Any, outputs: Any, troubles: Sequence[Trouble]
    ) -> None:
        """Add float32 for a user-defined layer to the remedies of its operations, if it is one."""
        operations = [x for x in troubles if not isinstance(x.operation, keras.Layer)]
        if not operations or not halves(layer):
            return
        try:
            again = self.runner.again(layer, args, kwargs)
        except Exception:  # noqa: BLE001 - then float32 is no remedy
            return
        found = of_layer(layer, self._place(layer), None, again, side(outputs, "wide"))
        for trouble in operations:
            trouble.remedies += tuple(found)

    def _watcher(self, container: Any) -> Watcher:
        """Return a function that compares each layer when a user-defined layer calls it."""
        is_entered = False

        def watcher(call: Any, layer: Any, args: Any, kwargs: Any) -> Any:
            nonlocal is_entered
            if layer is container and not is_entered:
                is_entered = True
                with watch_calls(watcher):
                    return call(layer, *args, **kwargs)
            outputs = self._step(layer, *keras.tree.map_structure(self._value, (args, kwargs)))
            for value in values_in(outputs):
                if value.troubles:
                    self._returned[id(value.half)] = value.half, value.troubles
            return side(outputs, "half")

        return watcher

    def _value(self, each: Any) -> Any:
        """Return a tensor inside a user-defined layer as a value; its float32 run comes later."""
        if not keras.ops.is_tensor(each):
            return each
        _, troubles = self._returned.get(id(each), (None, ()))
        return Value(each, widen(each), troubles=troubles)

    # ----------------------------------------------------------------------------- the tape

    @contextlib.contextmanager
    def _inside(self, container: Any) -> Iterator[None]:
        """Keep steps off the tape that are part of one, and let them run as its other runs do."""
        runner, tape = self.runner, self._tape or Tape()
        before = runner.training, tape.is_paused
        runner.training, tape.is_paused = runner.training and not draws(container), True
        try:
            yield
        finally:
            runner.training, tape.is_paused = before

    def _record(self, step: Step, outputs: Any, kind: str) -> Any:
        """Put a step on the tape that is not judged, and return its outputs."""
        for value in values_in(outputs):
            self._look(step, value.half, value.wide)
        return self._keep(step, outputs, kind)

    def _keep(self, step: Step, outputs: Any, kind: str) -> Any:
        """Put a step on the tape, and return its outputs."""
        if self._tape is not None:
            adds_losses = bool(self.runner.losses)
            self._tape.record(step._replace(outputs=outputs, kind=kind, adds_losses=adds_losses))
            self._check_mask(step.operation, step.given, outputs)
        return outputs

    def _check_mask(self, operation: Any, given: Sequence[Value], outputs: Any) -> None:
        """Note a layer that does not know masks and is given one."""
        if self._tape is None or not isinstance(operation, keras.Layer):
            return
        masks = [mask_of(value.wide) for value in given]
        if operation.supports_masking or all(mask is None for mask in masks):
            return
        if all(mask_of(value.wide) is None for value in values_in(outputs)):
            self._tape.lost_masks.append(self._place(operation))

    def _look(
        self,
        step: Step,
        half: Any,
        wide: Any,
        seen: Comparison = Comparison(),  # noqa: B008 - a frozen value
        began_here: float = 0.0,
    ) -> None:
        """Note what a tensor looks like that a step returns."""
        if self._tape is not None and is_float(wide):
            tensor = look(step.place, "forward", step.dtype, half, wide, seen, began_here)
            self._tape.tensors.append(tensor)

    # ----------------------------------------------------------------------------- judging

    def _judge(self, outcome: Outcome, structure: Any) -> Any:
        """Report what is wrong with the outputs of a step, and return them as values.

        Args:
            outcome: What it returned.
            structure: Outputs, in the structure to return.
        """
        values, is_right = [], True
        for index, (half, wide) in enumerate(outcome.pairs):
            if not keras.ops.is_tensor(half):
                values.append(half)
                continue
            masks = outcome.masks(index)
            if masks.differing:
                self._look(outcome.step, half, wide)
                self._report(outcome.trouble("mask", masks))
                values.append(follow(half, wide))
                is_right = False
                continue
            verdict, numbers, seen = outcome.judge(index)
            self._look(outcome.step, half, wide, seen, outcome.began_here(index, seen))
            values.append(self._judged(outcome, index, verdict, numbers, seen.error))
            is_right &= verdict.waits or verdict in {Verdict.FINE, Verdict.CARRY}
        outputs = keras.tree.pack_sequence_as(structure, values)
        # If they are wrong, the gradients are too.
        return self._keep(outcome.step, outputs, "both" if is_right else "float32")

    def _judged(
        self, outcome: Outcome, index: int, verdict: Verdict, numbers: Comparison, error: float
    ) -> Any:
        """Report what a verdict says about an output, and return it as a value."""
        step, earlier = outcome.step, outcome.earlier
        half, wide = outcome.pairs[index]
        if verdict is Verdict.FINE:
            return Value(half, wide, error, outcome.merged)
        if verdict is Verdict.CARRY:
            return Value(half, wide, error, earlier, repaired=outcome.repaired(index))
        if verdict is Verdict.EARLIER:
            fits = outcome.is_repaired(index)
            for each in earlier:
                self._report(each, step, fits=fits)
            return follow(half, wide, earlier)
        looks_up = isinstance(step.operation, keras.layers.Embedding)  # another row is worse
        shows_merge = verdict is Verdict.SENSITIVE and outcome.merged and not looks_up
        if shows_merge or outcome.differs_each_time():
            return follow(half, wide)
        if verdict.waits:
            waiting = outcome.trouble_of_input(numbers) or outcome.trouble(verdict.value, numbers)
            repaired = outcome.repaired(index)
            return Value(half, wide, error, (waiting, *earlier), repaired=repaired)
        now = outcome.trouble(verdict.value, numbers)
        self._report(now)
        return follow(half, wide, (now,))

    def _report(self, trouble: Trouble, until: Step | None = None, *, fits: bool = False) -> None:
        """Add a trouble, unless its step has one already.

        Args:
            trouble: The trouble.
            until: The step in whose outputs it shows, if it is a later one.
            fits: Whether it mends them to compute in float32 up to that step.
        """
        is_of_data = trouble.kind in OF_DATA
        if trouble in self.troubles or (
            not is_of_data
            and any(
                each.operation is trouble.operation and each.kind not in OF_DATA
                for each in self.troubles
            )
        ):
            return
        if until is not None and until.operation is not trouble.operation and not is_of_data:
            trouble.until = until.place
            if fits:
                trouble.remedies += (float32_until(trouble, until.operation, until.place),)
        self.troubles.append(trouble)

    def _troubles_of_inputs(self, operation: Any, given: Sequence[Value]) -> list[Trouble]:
        """Return the troubles that come with the inputs of a step; report merged values."""
        found = [trouble for value in given for trouble in value.troubles]
        half = rounds_to(operation)
        if half is None:
            return list(dict.fromkeys(found))
        for value in given:
            is_rounded = is_float(value.half) or cast_dtype(operation) is not None
            key = id(value.half), half
            if value.exact and is_rounded:
                if key not in self._of_data:
                    place = value.source or self._place(operation)
                    troubles = troubles_of_data(value, place, operation, half)
                    self._of_data[key] = value.half, troubles
                found += self._of_data[key][1]
        for trouble in found:
            if trouble.kind == "merged":
                self._report(trouble)
        return list(dict.fromkeys(found))

    def _place(self, operation: Any) -> str:
        """Return the path of a layer, or the name of an operation after that of its model."""
        if isinstance(operation, keras.Layer):
            return self._paths.get(id(operation)) or str(operation.path or operation.name)
        return "/".join((*self._path, operation.name))


def _in_order(graph: Any, args: Any, given: Sequence[Value]) -> Sequence[Value]:
    """Return the values that a graph is called with in the order of its inputs."""
    if len(args) == 1 and isinstance(args[0], dict) and not isinstance(graph.input, dict):
        return [args[0][tensor.name] for tensor in graph.inputs]
    return given


def _pending(troubles: Sequence[Trouble]) -> list[Trouble]:
    """Return the troubles that count only if a later step shows them."""
    return [trouble for trouble in troubles if trouble.kind != "merged"]
