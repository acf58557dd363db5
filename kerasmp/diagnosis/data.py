"""A batch of data that float16 cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.constants import LARGEST
from kerasmp.backend.keras_graph import calls, graph_of
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.diagnosis.dtypes import EXACT
from kerasmp.diagnosis.finding import Finding
from kerasmp.diagnosis.sizes import MULTIPLE
from kerasmp.policy.locations import PASSING_THROUGH
from kerasmp.policy.safe import is_kerasmp_layer, loses_mask_value
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterator

_TAKING_IDS = (keras.layers.Embedding, keras.layers.CategoryEncoding, keras.layers.HashedCrossing)


def findings(model: Any, arrays: list[Any]) -> Iterator[Finding]:
    """Yield what is wrong with a batch for a model.

    Args:
        model: A Keras model.
        arrays: A batch of NumPy arrays, in the order of the model's inputs.
    """
    graph = graph_of(model)
    for number, array in enumerate(arrays):
        largest = _largest(array)
        if largest > LARGEST and _reaches_float16(model, graph, number, arrays):
            name = graph.inputs[number].name if graph is not None else str(number)
            yield Finding(
                "error",
                f"input {name}",
                "input-range",
                f"It has values up to {largest:g}, and a float16 layer takes them: above "
                f"{LARGEST:g} they are inf.",
                "Scale the data, or begin with a Normalization or Rescaling layer with "
                'dtype="float32".',
            )
        if graph is None and _rounds_ids(model, array):
            yield Finding(
                "error",
                f"input {number}",
                "float-ids",
                f"It may hold ids, which {model.name} takes as {array.dtype} and rounds to "
                f"{model.compute_dtype}: above {EXACT[model.compute_dtype]} they become others.",
                "Pass whole numbers.",
            )
    batch = min((len(array) for array in arrays if array.ndim), default=0)
    if batch % MULTIPLE and any(layer.compute_dtype in HALVES for layer in flatten_layers(model)):
        yield Finding(
            "hint",
            model.name,
            "sizes",
            f"batch size {batch}: Tensor Cores want multiples of {MULTIPLE}.",
            "Round up.",
        )


def _rounds_ids(model: Any, array: Any) -> bool:
    """Return whether a model rounds whole numbers that come as floats, and may look rows up."""
    exact = EXACT.get(model.compute_dtype)
    return (
        exact is not None
        and array.dtype.kind == "f"
        and bool(np.any(array > exact) and np.all(array == np.round(array)))
        and any(isinstance(layer, keras.layers.Embedding) for layer in flatten_layers(model))
    )


def _largest(array: Any) -> float:
    return float(np.max(np.abs(array), initial=0.0)) if array.dtype.kind in "fiu" else 0.0


def _unmasked(array: Any, layer: Any, *, as_given: bool) -> Any:
    """Return what is left of an array where a layer makes zeros of masked steps.

    Args:
        array: An input of the model.
        layer: What it comes to.
        as_given: Whether it comes in this shape. Else nobody can tell here which values are a step,
            and all that are a mask value may be masked.
    """
    if not isinstance(layer, keras.layers.Masking) or (
        not is_kerasmp_layer(layer) and loses_mask_value(layer.mask_value, "float16")
    ):
        return array
    narrow, value = array.astype("float32"), keras.ops.convert_to_numpy(layer.mask_value)
    if not as_given:
        return array[~np.isin(narrow, value.astype("float32"))]
    return array[~np.all(narrow == value.astype("float32"), axis=-1)]


def _computes_in_float16(operation: Any) -> bool:
    return (
        isinstance(operation, keras.Layer)
        and not isinstance(operation, _TAKING_IDS)
        and str(operation.compute_dtype) == "float16"
    )


def _reaches_float16(
    model: Any, graph: Any, number: int, arrays: list[Any], *, as_given: bool = True
) -> bool:
    """Return whether a large input arrives at a float16 layer before any layer in float32."""
    if graph is None or len(graph.inputs) != len(arrays):
        return str(model.compute_dtype) == "float16"  # a model casts what its `call` is given
    if graph.inputs[number].dtype == "float16":
        return True
    first = graph.inputs[number]
    as_given = as_given and arrays[number].ndim == len(first.shape)  # Keras may add or drop an axis
    waiting = [first]
    while waiting:
        tensor = waiting.pop()
        for call in calls(graph):
            if not any(each is tensor for each in call.inputs):
                continue
            layer = call.operation
            nested = graph_of(layer)
            if nested is not None:
                location = next(i for i, each in enumerate(call.inputs) if each is tensor)
                inside = [arrays[number]] * len(call.inputs)
                same = as_given and tensor is first
                if _reaches_float16(layer, nested, location, inside, as_given=same):
                    return True
            elif _computes_in_float16(layer) and (
                _largest(_unmasked(arrays[number], layer, as_given=as_given and tensor is first))
                > LARGEST
            ):
                return True
            elif not isinstance(layer, keras.Layer) or isinstance(layer, PASSING_THROUGH):
                waiting += [t for t in call.outputs if keras.backend.is_float_dtype(t.dtype)]
    return False
