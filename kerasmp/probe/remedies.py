"""Tries what could mend a step, on the batch that shows the fault."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import calls
from kerasmp.layers.from_stock import apply_swaps, layer_replacements
from kerasmp.ops import normalize
from kerasmp.policy.apply import take_back
from kerasmp.policy.spec import HALVES
from kerasmp.probe.arrays import compare_tensors
from kerasmp.probe.compare import EPSILON
from kerasmp.probe.judge import FAULT, FLUSHED

CAST = 'Cast its inputs to "float32" with keras.ops.cast, and its result back.'

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kerasmp.backend.keras_graph import Call
    from kerasmp.policy.apply import Undo
    from kerasmp.probe.values import Trouble, Value


def of_layer(  # noqa: PLR0913 - a layer, where it is, and what its runs return
    layer: Any,
    place: str,
    run: Callable[[Any], Any] | None,
    in_float32: Any,
    wide: Any,
    *,
    holds: bool = True,
) -> list[str]:
    """Return what mends a layer.

    Args:
        layer: The layer.
        place: Its path, as rules know it.
        run: Calls a layer on the inputs as half precision rounds them. None: float32 only.
        in_float32: The outputs of the layer in float32 on these inputs, or None if it fails.
        wide: Its outputs in float32, on inputs that were never rounded.
        holds: Whether half precision has to hold them.
    """
    found, half = [], layer.compute_dtype
    cls = layer_replacements().get(type(layer))
    if run is not None and cls is not None:
        swapped = functools.partial(_swapped, layer, cls, run)
        if mends(swapped, wide, half, holds=holds):
            found.append(
                f"Use kerasmp.layers.{cls.__name__}, or convert the model with safe_layers=True."
            )
    if in_float32 is not None and mends(lambda: in_float32, wide, half, holds=holds):
        found.append(
            f'Compute it in float32: pass dtype="float32", or the rule {{"{place}": "float32"}}.'
        )
    return found


def mends(outputs: Callable[[], Any], wide: Any, half: str, *, holds: bool = True) -> bool:
    """Return whether outputs are those of float32, and half precision can hold them.

    Args:
        outputs: Returns the outputs; if it raises an error, they are not those of float32.
        wide: The outputs in float32.
        half: The dtype in whose roundings errors count.
        holds: Whether this dtype has to hold them.
    """
    half = half if half in HALVES else "float16"
    try:
        pairs = zip(keras.tree.flatten(outputs()), keras.tree.flatten(wide), strict=True)
        return all(_agrees(one, other, half, holds=holds) for one, other in pairs)
    except Exception:  # noqa: BLE001 - a layer may raise anything
        return False


def _agrees(one: Any, other: Any, half: str, *, holds: bool = True) -> bool:
    if not keras.ops.is_tensor(one):
        return True
    if holds and keras.backend.is_float_dtype(keras.backend.standardize_dtype(one.dtype)):
        one = keras.ops.cast(one, half)
    seen = compare_tensors(one, other)
    return (
        not (seen.nonfinite or seen.saturated or seen.differing)
        and seen.error <= FAULT * EPSILON[half]
        and seen.flushed <= FLUSHED * seen.nonzero
    )


def _swapped(layer: Any, cls: type, run: Callable[[Any], Any]) -> Any:
    """Return the outputs of a layer while it has another class."""
    undo: Undo = []
    try:
        apply_swaps(layer, [(layer, cls)], undo)
        return run(layer)
    finally:
        take_back(undo)


def of_operation(
    graph: Any, operation: Any, given: Sequence[Value], in_float32: Any, wide: Any
) -> list[str]:
    """Return what mends an operation of a graph.

    Args:
        graph: The graph.
        operation: The operation.
        given: Its inputs, as values.
        in_float32: Its outputs in float32 on inputs as half precision rounds them, or None.
        wide: Its outputs in float32.
    """
    half = _half_of(given[0].half) if given else "float16"
    found = normalization(graph, operation, given)
    if in_float32 is not None and mends(lambda: in_float32, wide, half):
        found.append(CAST)
    return found


def float32_until(trouble: Trouble, until: Any, place: str) -> str:
    """Return the remedy of computing in float32 until the values fit into half precision again.

    Args:
        trouble: Values that half precision cannot hold.
        until: The step that returns such values again.
        place: The place of that step.
    """
    if isinstance(trouble.operation, keras.Layer) and isinstance(until, keras.Layer):
        return (
            f'Compute "{trouble.place}", "{place}" and the layers between them in float32, '
            "with rules or dtype=."
        )
    return (
        f'Cast to float32 before it, and back after "{place}", where the values fit '
        f"{trouble.half} again."
    )


def normalization(graph: Any, operation: Any, given: Sequence[Value]) -> list[str]:
    """Return `kerasmp.ops.normalize` as the remedy if an operation begins a division by a norm.

    Args:
        graph: The graph.
        operation: The operation, such as the square in `z / sqrt(sum(square(z)))`.
        given: Its inputs.
    """
    steps = _division_by_norm(graph, operation)
    axis = next((s.operation.axis for s in steps if hasattr(s.operation, "axis")), None)
    if axis is None:
        return []
    if isinstance(axis, list | tuple) and len(axis) == 1:
        [axis] = axis  # Keras's reductions keep a list, which fails on JAX's symbols
    z, wide = given[0].half, given[0].wide
    known = {id(steps[0].inputs[0]): wide}
    try:
        for step in steps:
            args, kwargs = step.node.arguments.fill_in(known)
            wide = known[id(step.outputs[0])] = step.operation(*args, **kwargs)
        if not _agrees(normalize(z, axis=axis), wide, _half_of(z)):
            return []
    except Exception:  # noqa: BLE001 - then it is another computation
        return []
    text = (
        f"Use kerasmp.ops.normalize(x, axis={axis!r}) instead of this and the operations up to "
        f'"{steps[-1].operation.name}".'
    )
    return [text]


def _division_by_norm(graph: Any, operation: Any) -> list[Call]:
    """Return the operations from a function of `z` to a division of `z` by what comes out."""
    steps = calls(graph)
    chain = [step for step in steps if step.operation is operation]
    if len(chain) != 1 or len({id(each) for each in chain[0].inputs}) != 1:
        return []
    z = chain[0].inputs[0]
    while True:
        result = chain[-1].outputs[0]
        users = [step for step in steps if any(each is result for each in step.inputs)]
        if len(users) != 1:
            return []
        chain.append(users[0])
        if any(each is z for each in users[0].inputs):
            name = type(users[0].operation).__name__
            return chain if name in {"Divide", "TrueDivide"} else []


def _half_of(tensor: Any) -> str:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return dtype if dtype in HALVES else "float16"
