"""Runs a model under its policy and in float32, step by step, and compares what each step returns.

A step is a call of a layer, or of an operation in a graph. Both runs go side by side through the
graph, so that no more than two copies of a tensor are alive. Where they differ by more than
rounding explains, the step runs once more: in float32, on inputs and weights as half precision
rounds them. This tells whether the step itself is at fault, or what came before it. Both runs go on
with float32's values, so that each step is judged by itself.
"""

from __future__ import annotations

import functools
import inspect
import operator
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
from kerasmp.probe.arrays import compare_tensors, is_float, to_numpy, widen
from kerasmp.probe.compare import Comparison
from kerasmp.probe.judge import Verdict, is_at_fault, judge
from kerasmp.probe.remedies import float32_until, mends, of_layer, of_operation
from kerasmp.probe.steps import (
    Runner,
    cast_dtype,
    half_dtype,
    halves,
    has_weights,
    is_container,
    is_user_defined,
    rounds_to,
)
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
    from collections.abc import Sequence

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
        walk = _Walk(model, Runner(model, seed, state))
        walk.run(model, x)
    return walk.troubles


class _Walk:
    def __init__(self, model: Any, runner: Runner) -> None:
        self.troubles: list[Trouble] = []
        self._runner = runner
        # What computes the mask of a Masking in a graph; the layer itself is judged.
        self._of_masks = {
            id(operation)
            for layer in flatten_layers(model)
            for _, operation in mask_operations(layer)
        }
        self._path: tuple[str, ...] = ()  # the models around the step, for names of operations
        self._graph: Any = None
        # For data and the dtype to which it is rounded: the tensor, so that its id stays its own,
        # and its troubles.
        self._of_data: dict[tuple[int, str], tuple[Any, list[Trouble]]] = {}
        # Troubles that layers inside a user-defined layer have returned, with the tensor.
        self._returned: dict[int, tuple[Any, tuple[Trouble, ...]]] = {}

    def run(self, model: Any, x: Any) -> None:
        """Pass a batch through the model."""
        graph = graph_of(model)
        if graph is not None and not has_own_call(model):
            outputs = self._run_graph(graph, graph_values(graph, x))
        else:
            outputs = self._step(model, (batch_values(x),), {})
        for value in values_in(outputs):
            for trouble in value.troubles:
                self._report(trouble)

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

    def _step(  # noqa: PLR0911 - one for each way to run a step
        self, operation: Any, args: Any, kwargs: Any
    ) -> Any:
        """Call a layer or operation on values, and return values."""
        given = values_in((args, kwargs))
        graph = graph_of(operation)
        if graph is not None and not has_own_call(operation):
            self._path = (*self._path, operation.name)
            try:
                return self._run_graph(graph, given)
            finally:
                self._path = self._path[:-1]
        if is_user_defined(operation):
            outputs = self._trace(operation, args, kwargs)
            if outputs is not None:
                return outputs
        is_same = all(value.half is value.wide and not value.troubles for value in given)
        if is_same and not halves(operation) and cast_dtype(operation) is None:
            outputs, _ = self._runner.half(operation, args, kwargs)
            exact = all(value.exact for value in given) and not has_weights(operation)
            return keras.tree.map_structure(lambda t: same(t, given, exact=exact), outputs)
        earlier = self._troubles_of_inputs(operation, given)
        reported = len(self.troubles)
        watcher = self._watcher(operation) if is_container(operation) else None
        try:
            half, is_random = self._runner.half(operation, args, kwargs, watcher)
        except Exception as error:  # noqa: BLE001 - a layer may raise anything
            wide = self._runner.wide(operation, args, kwargs)  # if this fails, the model is wrong
            fails = self._trouble("fails", operation, args, kwargs, wide, wide, error)
            for trouble in _pending(earlier) or [fails]:  # infinities make it fail
                self._report(trouble, operation)
            return pair(follow, wide, wide)
        try:
            wide = self._runner.wide(operation, args, kwargs)
        except Exception:  # noqa: BLE001 - code that is written for half precision only
            return keras.tree.map_structure(self._value, half)
        # The layers in it have reported already.
        if is_random or len(self.troubles) > reported or id(operation) in self._of_masks:
            return pair(follow, half, wide)
        return self._judge(operation, args, kwargs, half, wide, earlier)

    def _trace(self, layer: Any, args: Any, kwargs: Any) -> Any:
        """Run what a user-defined layer calls, step by step; None if that cannot be traced."""
        given = values_in((args, kwargs))
        takes_mask = "mask" in inspect.signature(layer.call).parameters
        if takes_mask and any(mask_of(value.half) is not None for value in given):
            return None
        first = len(self.troubles)
        earlier = self._troubles_of_inputs(layer, given)
        inputs = [cast_value(value, rounds_to(layer), earlier) for value in given]
        cast = {id(one): other.half for one, other in zip(given, inputs, strict=True)}
        tensors = keras.tree.map_structure(lambda x: cast.get(id(x), x), (args, kwargs))
        if takes_training(layer):
            tensors[1].setdefault("training", False)
        traced = trace_graph(layer, *tensors)
        if traced is None:
            return None
        graph, of_masks = traced
        self._of_masks.update(map(id, of_masks))
        outer = self._path, self._runner.dtype
        self._path, self._runner.dtype = (layer.path or layer.name,), str(layer.compute_dtype)
        try:
            outputs = self._run_graph(graph, inputs)
        except Exception:  # noqa: BLE001 - then the layer is called as a whole
            outputs = None
        self._path, self._runner.dtype = outer
        operations = [x for x in self.troubles[first:] if not isinstance(x.operation, keras.Layer)]
        if outputs is None or any(trouble.kind == "fails" for trouble in operations):
            del self.troubles[first:]
            return None
        if operations and halves(layer):
            again = self._again(layer, args, kwargs)
            found = of_layer(layer, None, again, side(outputs, "wide"))
            for trouble in operations:
                trouble.remedies += tuple(found)
        return outputs

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

    # ----------------------------------------------------------------------------- judging

    def _judge(  # noqa: C901, PLR0913, PLR0917 - a step with its two results, and each verdict
        self, operation: Any, args: Any, kwargs: Any, half: Any, wide: Any, earlier: list[Trouble]
    ) -> Any:
        """Compare the outputs of a step, report what is wrong, and return them as values."""
        given = values_in((args, kwargs))
        error = max((value.error for value in given), default=0.0)
        dtype = half_dtype(operation, given, half)
        flat = keras.tree.flatten(half)
        merges = tuple(trouble for trouble in earlier if trouble.kind == "merged")
        looks_up = isinstance(operation, keras.layers.Embedding)  # another row is worse
        again: dict[bool, list[Any]] = {}

        @functools.cache
        def repaired() -> list[Any]:
            """Return the outputs if it computes in float32, and the troubled steps before it."""
            try:
                outputs = self._runner.wide(operation, args, kwargs, "repaired")
            except Exception:  # noqa: BLE001 - a layer may raise anything
                return [None] * len(flat)
            return list(keras.tree.flatten(outputs))

        def own(index: int) -> Comparison:
            """Compare an output with that of the step in float32 on the same rounded inputs."""
            found = []
            for every in (False, True):  # some layers round weights themselves
                if every not in again:
                    outputs = self._runner.again(operation, args, kwargs, every=every)
                    again[every] = keras.tree.flatten(outputs)
                found.append(compare_tensors(flat[index], again[every][index]))
                if not is_at_fault(found[-1], dtype):
                    break
            return min(found, key=lambda each: each.error)

        def trouble(kind: str, numbers: Comparison) -> Trouble:
            return self._trouble(kind, operation, args, kwargs, half, wide, numbers)

        def differs_each_time() -> bool:
            """Return whether the step draws random numbers in a way that Keras does not know."""
            second, _ = self._runner.half(operation, args, kwargs)
            pairs = zip(flat, keras.tree.flatten(second), strict=True)
            seen = [compare_tensors(a, b) for a, b in pairs if keras.ops.is_tensor(a)]
            return any(each.error or each.differing for each in seen)

        values = []
        for index, (h, w) in enumerate(zip(flat, keras.tree.flatten(wide), strict=True)):
            if not keras.ops.is_tensor(h):
                values.append(h)
                continue
            masks = _compare_masks(h, w)
            if masks.differing:
                self._report(trouble("mask", masks))
                values.append(follow(h, w))
                continue
            seen = compare_tensors(h, w)
            verdict, numbers = judge(
                seen,
                functools.partial(own, index),
                error,
                dtype,
                has_troubles=bool(_pending(earlier)),
            )
            if verdict is Verdict.FINE:
                values.append(Value(h, w, seen.error, merges))
            elif verdict is Verdict.CARRY:
                values.append(
                    Value(h, w, seen.error, tuple(earlier), repaired=repaired()[index])
                )
            elif verdict is not Verdict.EARLIER and differs_each_time():
                values.append(follow(h, w))
            elif verdict is Verdict.EARLIER:
                fits = mends(functools.partial(operator.getitem, repaired(), index), w, dtype)
                for each in earlier:
                    self._report(each, operation, fits=fits)
                values.append(follow(h, w, tuple(earlier)))
            elif verdict is Verdict.SENSITIVE and merges and not looks_up:
                values.append(follow(h, w))  # it shows that values are equal
            elif verdict.waits:
                waiting = _of_input(given, operation, dtype, numbers) or trouble(
                    verdict.value, numbers
                )
                values.append(
                    Value(h, w, seen.error, (waiting, *earlier), repaired=repaired()[index])
                )
            else:
                now = trouble(verdict.value, numbers)
                self._report(now)
                values.append(follow(h, w, (now,)))
        return keras.tree.pack_sequence_as(half, values)

    def _trouble(  # noqa: PLR0913, PLR0917 - a step with its results
        self,
        kind: str,
        operation: Any,
        args: Any,
        kwargs: Any,
        half: Any,
        wide: Any,
        numbers: Any,
    ) -> Trouble:
        """Return what is wrong with a step, with the remedies that mend it."""
        given = values_in((args, kwargs))
        again = self._again(operation, args, kwargs)
        if isinstance(operation, keras.Layer):
            found = of_layer(
                operation, lambda layer: self._runner.half(layer, args, kwargs)[0], again, wide
            )
        else:
            found = of_operation(self._graph, operation, given, again, wide)
        dtype = half_dtype(operation, given, half)
        return Trouble(kind, self._place(operation), operation, dtype, numbers, tuple(found))

    def _again(self, operation: Any, args: Any, kwargs: Any) -> Any:
        try:
            return self._runner.again(operation, args, kwargs)
        except Exception:  # noqa: BLE001 - then float32 is no remedy
            return None

    def _report(self, trouble: Trouble, operation: Any = None, *, fits: bool = False) -> None:
        """Add a trouble, unless its step has one already.

        Args:
            trouble: The trouble.
            operation: The step in whose outputs it shows, if it is a later one.
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
        if operation is not None and operation is not trouble.operation and not is_of_data:
            trouble.until = self._place(operation)
            if fits:
                trouble.remedies += (float32_until(trouble, operation, trouble.until),)
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
            return str(operation.path or operation.name)
        return "/".join((*self._path, operation.name))


def _pending(troubles: Sequence[Trouble]) -> list[Trouble]:
    """Return the troubles that count only if a later step shows them."""
    return [trouble for trouble in troubles if trouble.kind != "merged"]


def _compare_masks(half: Any, wide: Any) -> Comparison:
    """Compare the masks of two tensors; equal if one has none."""
    masks = mask_of(half), mask_of(wide)
    return Comparison() if any(mask is None for mask in masks) else compare_tensors(*masks)


def _of_input(
    given: Sequence[Value], operation: Any, dtype: str, numbers: Comparison
) -> Trouble | None:
    """Return the trouble of an input outside the range whose values a step hands on, or None."""
    is_input = len(given) == 1 and given[0].exact and given[0].source is not None
    if not is_input or not np.any(to_numpy(given[0].wide) == numbers.worst[1]):
        return None
    found = troubles_of_data(given[0], str(given[0].source), operation, dtype)
    return next((trouble for trouble in found if trouble.kind == "range"), None)
