"""Checks a batch: values that float16 cannot hold, and ids that a model rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.constants import LARGEST
from kerasmp.backend.keras_graph import calls, graph_of
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.diagnosis.dtypes import LARGEST_EXACT_INTEGER
from kerasmp.diagnosis.finding import Finding
from kerasmp.diagnosis.sizes import MULTIPLE
from kerasmp.policy.locations import PASSING_THROUGH
from kerasmp.policy.safe import is_kerasmp_layer, loses_mask_value
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterator

_TAKE_IDS = (keras.layers.Embedding, keras.layers.CategoryEncoding, keras.layers.HashedCrossing)


def findings(model: Any, arrays: list[Any]) -> Iterator[Finding]:
    """Yield the problems that a batch has with a model.

    Args:
        model: A Keras model.
        arrays: The batch as NumPy arrays, in the order of the model's inputs.
    """
    graph = graph_of(model)
    for index, array in enumerate(arrays):
        largest = _largest(array)
        if largest > LARGEST and _reaches_float16(model, graph, index, arrays):
            name = graph.inputs[index].name if graph is not None else str(index)
            yield Finding(
                "error",
                f"input {name}",
                "input-range",
                f"Values up to {largest:g} reach a float16 layer. Above {LARGEST:g} they become "
                "inf.",
                "Scale the data, or start the model with a Normalization or Rescaling layer with "
                'dtype="float32".',
            )
        if graph is None and _rounds_ids(model, array):
            yield Finding(
                "error",
                f"input {index}",
                "float-ids",
                f"Its {array.dtype} values may be ids. {model.name} rounds them to "
                f"{model.compute_dtype}, so ids above "
                f"{LARGEST_EXACT_INTEGER[model.compute_dtype]} become other ids.",
                "Pass integers.",
            )
    batch = min((len(array) for array in arrays if array.ndim), default=0)
    if batch % MULTIPLE and any(layer.compute_dtype in HALVES for layer in flatten_layers(model)):
        yield Finding(
            "hint",
            model.name,
            "sizes",
            f"batch size {batch}: Tensor Cores are fastest with multiples of {MULTIPLE}.",
            "Round it up.",
        )


def _rounds_ids(model: Any, array: Any) -> bool:
    """Return whether a model rounds integers in a float array that may be ids for an Embedding."""
    exact = LARGEST_EXACT_INTEGER.get(model.compute_dtype)
    return (
        exact is not None
        and array.dtype.kind == "f"
        and bool(np.any(array > exact) and np.all(array == np.round(array)))
        and any(isinstance(layer, keras.layers.Embedding) for layer in flatten_layers(model))
    )


def _largest(array: Any) -> float:
    return float(np.max(np.abs(array), initial=0.0)) if array.dtype.kind in "fiu" else 0.0


def _unmasked(array: Any, layer: Any, *, original_shape: bool) -> Any:
    """Return the values of an array, without the steps that a Masking layer replaces by zeros.

    Args:
        array: An input of the model.
        layer: The layer that receives it.
        original_shape: Whether the layer receives it in its original shape. If not, its steps are
            unknown, and every value that equals a mask value counts as masked.
    """
    if not isinstance(layer, keras.layers.Masking) or (
        not is_kerasmp_layer(layer) and loses_mask_value(layer.mask_value, "float16")
    ):
        return array
    values = array.astype("float32")
    mask_value = keras.ops.convert_to_numpy(layer.mask_value).astype("float32")
    if not original_shape:
        return array[~np.isin(values, mask_value)]
    return array[~np.all(values == mask_value, axis=-1)]


def _computes_in_float16(operation: Any) -> bool:
    return (
        isinstance(operation, keras.Layer)
        and not isinstance(operation, _TAKE_IDS)
        and str(operation.compute_dtype) == "float16"
    )


def _reaches_float16(
    model: Any, graph: Any, index: int, arrays: list[Any], *, original_shape: bool = True
) -> bool:
    """Return whether large values of an input reach a float16 layer before a float32 layer."""
    if graph is None or len(graph.inputs) != len(arrays):
        return str(model.compute_dtype) == "float16"  # a model casts the inputs of its `call`
    array, first = arrays[index], graph.inputs[index]
    if first.dtype == "float16":
        return True
    original_shape = original_shape and array.ndim == len(first.shape)  # Keras may change an axis
    pending = [first]
    while pending:
        tensor = pending.pop()
        unchanged = original_shape and tensor is first
        for call in calls(graph):
            if not any(each is tensor for each in call.inputs):
                continue
            layer = call.operation
            nested = graph_of(layer)
            if nested is not None:
                position = next(i for i, each in enumerate(call.inputs) if each is tensor)
                inputs = [array] * len(call.inputs)
                if _reaches_float16(layer, nested, position, inputs, original_shape=unchanged):
                    return True
            elif _computes_in_float16(layer) and (
                _largest(_unmasked(array, layer, original_shape=unchanged)) > LARGEST
            ):
                return True
            elif not isinstance(layer, keras.Layer) or isinstance(layer, PASSING_THROUGH):
                pending += [t for t in call.outputs if keras.backend.is_float_dtype(t.dtype)]
    return False
