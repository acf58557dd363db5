"""Tensors of both runs, and what goes wrong with them."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.keras_graph import input_tensors
from kerasmp.backend.keras_internals import copy_mask
from kerasmp.policy.spec import HALVES
from kerasmp.probe.arrays import is_float, to_numpy, widen
from kerasmp.probe.compare import LARGEST, merged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Kinds of trouble that are about a tensor that a step receives, and not about the step.
OF_DATA = ("merged", "range")


@dataclasses.dataclass(eq=False)
class Trouble:
    """What half precision does to values at one place.

    Attributes:
        kind: The value of a `Verdict`, or "fails", "mask", "merged" or "range".
        place: The path of the layer, the name of the operation, or "input NAME".
        operation: The layer or operation.
        half: The dtype.
        numbers: A `Comparison`; for "merged" a `Merge`; for "fails" the error; for "range" the
            largest magnitude.
        remedies: What was tried on this batch and mends it.
        until: The place of a later step whose outputs it changes, if it was found there.
    """

    kind: str
    place: str
    operation: Any
    half: str
    numbers: Any
    remedies: tuple[str, ...] = ()
    until: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of both runs.

    Attributes:
        half: The tensor under the model's policies.
        wide: The tensor in float32.
        error: The relative error of `half`.
        troubles: Troubles of earlier steps that may show later: `half` has an infinity, or a 0,
            that float32 has not.
        source: "input NAME", if it comes from this input of the model alone.
        exact: Whether nothing was rounded so far, and nothing comes from weights.
        repaired: The tensor if all steps since the first of the troubles compute in float32.
    """

    half: Any
    wide: Any
    error: float = 0.0
    troubles: tuple[Trouble, ...] = ()
    source: str | None = None
    exact: bool = False
    repaired: Any = None


def values_in(structure: Any) -> list[Value]:
    """Return the values in a structure, in order."""
    return [each for each in keras.tree.flatten(structure) if isinstance(each, Value)]


def side(structure: Any, name: str) -> Any:
    """Return the tensors of a run in the structure of the values.

    Args:
        structure: Values in any structure; anything else is returned as it is.
        name: "half"; "wide"; or "repaired", which is `half` in float32 where there is no trouble.
    """

    def tensor(each: Any) -> Any:
        if not isinstance(each, Value):
            return each
        found = getattr(each, name)
        return widen(each.half) if found is None else found

    return keras.tree.map_structure(tensor, structure)


def pair(make: Callable[[Any, Any], Any], half: Any, wide: Any) -> Any:
    """Return `make(half, wide)` for each tensor of two results, in their structure."""
    pairs = zip(keras.tree.flatten(half), keras.tree.flatten(wide), strict=True)
    return keras.tree.pack_sequence_as(half, [make(h, w) for h, w in pairs])


def same(tensor: Any, given: Sequence[Value], *, exact: bool) -> Any:
    """Return a tensor that is the same in both runs as a value.

    Args:
        tensor: The tensor; anything else is returned as it is.
        given: What it was computed from.
        exact: Whether nothing was rounded, and no weights took part.
    """
    if not keras.ops.is_tensor(tensor):
        return tensor
    source = given[0].source if exact and len(given) == 1 else None
    return Value(tensor, tensor, exact=exact, source=source)


def follow(half: Any, wide: Any, troubles: tuple[Trouble, ...] = ()) -> Any:
    """Return float32's tensor as the result of both runs, rounded to the dtype of `half`.

    Args:
        half: The tensor in half precision; anything but a tensor is returned as it is.
        wide: The tensor in float32.
        troubles: What was reported, if values outside the range may make it show again.
    """
    if not keras.ops.is_tensor(half):
        return half
    dtype = keras.backend.standardize_dtype(half.dtype)
    if dtype not in HALVES:
        return Value(wide, wide)
    top = LARGEST[dtype]
    rounded = keras.ops.cast(keras.ops.clip(wide, -top, top), dtype)
    is_outside = bool(keras.ops.convert_to_numpy(keras.ops.any(keras.ops.abs(wide) > top)))
    return Value(copy_mask(wide, rounded), wide, troubles=troubles if is_outside else ())


def cast_value(value: Value, dtype: str | None, troubles: Sequence[Trouble]) -> Value:
    """Return a value as a layer's code receives it, after the layer has cast it to `dtype`."""
    if dtype is None or not is_float(value.half):
        return value
    if dtype not in HALVES and keras.backend.standardize_dtype(value.half.dtype) == dtype:
        return value
    cast = copy_mask(value.half, keras.ops.cast(value.half, dtype))
    exact = value.exact and dtype not in HALVES
    return dataclasses.replace(value, half=cast, troubles=tuple(troubles), exact=exact)


def batch_values(x: Any) -> Any:
    """Return a batch as values, in its structure."""
    flat = keras.tree.flatten(x)
    is_named = isinstance(x, dict) and len(x) == len(flat)
    names = sorted(x) if is_named else range(len(flat))
    tensors = map(keras.ops.convert_to_tensor, flat)
    values = [
        Value(t, t, source=f"input {name}", exact=True)
        for name, t in zip(names, tensors, strict=True)
    ]
    return keras.tree.pack_sequence_as(x, values)


def graph_values(graph: Any, x: Any) -> list[Value | None]:
    """Return a batch as values, one for each input of a graph, which may round them."""
    if isinstance(x, dict) and not isinstance(graph.input, dict):
        x = [x[tensor.name] for tensor in graph.inputs]
    inputs = zip(graph.inputs, keras.tree.flatten(x), input_tensors(graph, x), strict=True)
    values: list[Value | None] = []
    for symbol, array, tensor in inputs:
        if tensor is None:  # an optional input
            values.append(None)
            continue
        wide = tensor
        if symbol.dtype in HALVES:
            wide = keras.ops.reshape(keras.ops.convert_to_tensor(array, "float32"), tensor.shape)
        values.append(Value(tensor, wide, source=f"input {symbol.name}", exact=True))
    return values


def troubles_of_data(value: Value, place: str, operation: Any, half: str) -> list[Trouble]:
    """Return what rounding does to data: values become equal, or infinite.

    Args:
        value: Data that nothing has rounded so far.
        place: The name of the step that rounds it, or of the input.
        operation: The step.
        half: The dtype to which it rounds.
    """
    array = to_numpy(value.wide)
    numbers = array[np.isfinite(array)].astype("float64")
    found: list[tuple[str, Any]] = []
    merge = merged(array, half)
    if merge is not None:
        found.append(("merged", merge))
    largest = float(np.max(np.abs(numbers), initial=0.0))
    if largest > LARGEST[half]:
        found.append(("range", largest))
    if not found:
        return []
    # As a Normalization does, by columns. What is not finite is not mended.
    finite = np.where(np.isfinite(array), array, np.nan).astype("float64")
    axes = tuple(range(array.ndim - 1)) if array.ndim > 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without any number
        spread = np.nanstd(finite, axis=axes)
        scaled = (finite - np.nanmean(finite, axis=axes)) / np.where(spread > 0, spread, 1.0)
    scaled = np.nan_to_num(scaled).astype("float32")
    mends = merged(scaled, half) is None and np.max(np.abs(scaled)) < LARGEST[half]
    remedy = (
        "Scale the data before the model, or start it with a keras.layers.Normalization that has "
        'dtype="float32".'
    )
    remedies = (remedy,) if mends else ()
    return [Trouble(kind, place, operation, half, numbers, remedies) for kind, numbers in found]
