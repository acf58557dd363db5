"""Where a layer stands in a model: what the rules need to know beyond its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from kerasmp.backend.keras_graph import (
    called_parts,
    calls,
    children,
    graph_of,
    has_mask,
    outermost_graphs,
    producer,
)
from kerasmp.backend.keras_internals import flatten_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kerasmp.backend.keras_graph import Call

# Layers that pass values through, so that the layer before them makes the output.
PASSING_THROUGH = (
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.Identity,
    keras.layers.Permute,
    keras.layers.RepeatVector,
    keras.layers.Reshape,
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.ZeroPadding3D,
)
# Layers that pass data on to a layer that needs it exactly, or scale it for that layer.
_PASSING_DATA_THROUGH = (*PASSING_THROUGH, keras.layers.Concatenate, keras.layers.Rescaling)
# Layers that need data exactly: they tell apart numbers that are equal in half precision.
EXACT_INPUTS = (
    keras.layers.CategoryEncoding,
    keras.layers.Discretization,
    keras.layers.Masking,
    keras.layers.Normalization,
)

SPECTRA = (keras.layers.MelSpectrogram, keras.layers.STFTSpectrogram)
# Modes of STFTSpectrogram. "log" and "angle" give small numbers, as do MelSpectrogram's decibels.
_LARGE_SPECTRA = ("imag", "magnitude", "psd", "real", "stft")
# What turns large numbers into small ones: layers, and functions or operations without the
# underscores in their names. Not BatchNormalization, which returns its inputs until it is trained.
_NORMALISING = (
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.RMSNormalization,
    keras.layers.Softmax,
    keras.layers.UnitNormalization,
)
_BOUNDED = ("hardsigmoid", "hardtanh", "sigmoid", "softmax", "softsign", "tanh")
_LOGARITHMS = ("log", "log10", "log1p", "log2", "logsoftmax")


class Location(NamedTuple):
    """Where a layer stands in a model.

    Args:
        path: Keras's path of the layer; if Keras gives it none, the holder's path and its name.
        holder: The layer or model that contains it; None for the model itself.
        final: Whether it makes outputs of the model.
        masked: Whether its input has a mask; None if no graph shows it.
        spectra: Whether its input contains spectra that nothing has normalised.
        feeds: The layers that need data exactly and receive it through this one.
        half: The half precision dtype in which the policy would let it compute; "" for none.
        depth: The number of layers and models that contain it; 0 for the model itself.
    """

    path: str
    holder: Any = None
    final: bool = False
    masked: bool | None = None
    spectra: bool = False
    feeds: tuple[Any, ...] = ()
    half: str = ""
    depth: int = 0


def locations(model: Any) -> list[tuple[Any, Location]]:
    """Return the model and each layer in it, at any depth, once, with its location.

    A holder comes before the layers that it contains.
    """
    found = list(_walk(model, Location(model.name), set()))
    layers = [layer for layer, _ in found]
    final = {id(layer) for layer in final_layers(model)}
    masked = _masked(layers)
    spectra = _receiving_spectra(model)
    feeds = _feeding(layers)
    return [
        (
            layer,
            location._replace(
                final=id(layer) in final,
                masked=masked.get(id(layer)),
                spectra=id(layer) in spectra,
                feeds=feeds.get(id(layer), ()),
            ),
        )
        for layer, location in found
    ]


def paths(model: Any) -> list[tuple[Any, str]]:
    """Return the model and each layer in it, at any depth, once, with its path in `locations`."""
    return [(layer, each.path) for layer, each in _walk(model, Location(model.name), set())]


def final_layers(model: Any) -> list[Any]:
    """Return the layers that make the model's outputs; none if no graph shows them.

    If a layer only rearranges or drops values, the layer before it counts as well. If an output
    comes from an operation that is not a layer, such as `outputs * 2`, all layers before the
    operation count. In a model without a `call`, whose train step uses the outputs of its parts,
    the layers count that make outputs of any part.
    """
    graph = graph_of(model)
    if graph is None:
        parts = called_parts(model)
        return [layer for x in parts if x is not model for layer in final_layers(x)]
    return producers_of(graph, graph.outputs)


def producers_of(graph: Any, tensors: Iterable[Any]) -> list[Any]:
    """Return the layers that make tensors of a model's graph, as `final_layers` describes.

    Args:
        graph: The functional model.
        tensors: Tensors in its graph.
    """
    found: list[Any] = []
    makers = {id(out): call for call in calls(graph) for out in call.outputs}
    pending = list(tensors)
    seen = set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or id(tensor) not in makers:
            continue
        seen.add(id(tensor))
        operation = producer(tensor)
        if graph_of(operation) is not None:
            found += final_layers(operation)
            continue
        is_layer = isinstance(operation, keras.Layer)
        if is_layer and not isinstance(operation, keras.layers.InputLayer):
            found.append(operation)
        if not is_layer or isinstance(operation, PASSING_THROUGH):
            pending += makers[id(tensor)].inputs
    return found


def exact_inputs_in(layer: Any) -> list[Any]:
    """Return the layers in a layer, and the layer itself, that need data exactly."""
    return [part for part in flatten_layers(layer) if isinstance(part, EXACT_INPUTS)]


def _walk(layer: Any, location: Location, seen: set[int]) -> Iterator[tuple[Any, Location]]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer, location
    # Keras's own paths begin with the names of the model's layers, not with the model's.
    prefix = f"{location.path}/" if location.depth else ""
    for part in children(layer):
        path = part.path or f"{prefix}{part.name}"
        yield from _walk(part, Location(path, layer, depth=location.depth + 1), seen)


def _masked(layers: Iterable[Any]) -> dict[int, bool]:
    """Return whether any input of a call has a mask, by the `id` of the called layer."""
    masked: dict[int, bool] = {}
    for layer in layers:
        for call in calls(layer):
            key = id(call.operation)
            masked[key] = masked.get(key, False) or any(map(has_mask, call.inputs))
    return masked


def _feeding(layers: Iterable[Any]) -> dict[int, tuple[Any, ...]]:
    """Return the layers that need data exactly, by the `id` of each layer that passes it on."""
    feeding: dict[int, tuple[Any, ...]] = {}
    for layer in layers:
        for receivers, tensors in _exact_inputs(layer):
            passing, _ = _trace_back(layer, tensors)
            for each in passing:
                feeding[id(each)] = (*feeding.get(id(each), ()), *receivers)
    return feeding


def _exact_inputs(model: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield layers that need data exactly, and the tensors of a model's graph that they receive.

    A layer in a nested model receives the inputs of the nested model that are passed on to it.
    """
    for call in calls(model):
        if graph_of(call.operation) is not None:
            for receivers, tensors in _exact_inputs(call.operation):
                _, indices = _trace_back(call.operation, tensors)
                yield receivers, _inputs_at(call, indices)
        elif isinstance(call.operation, keras.Layer):
            is_embedding = isinstance(call.operation, keras.layers.Embedding)
            receivers = [call.operation] if is_embedding else exact_inputs_in(call.operation)
            if receivers:
                yield receivers, call.inputs


def _trace_back(model: Any, tensors: Iterable[Any]) -> tuple[list[Any], list[int]]:
    """Follow tensors of a model's graph back through the layers that pass data on.

    Args:
        model: The model.
        tensors: Tensors in its graph.

    Returns:
        These layers, also of nested models, and the indices of the model's inputs from which the
        data may come. The search ends at integer tensors, which no layer rounds.
    """
    graph: Any = graph_of(model)
    inputs = {id(tensor): index for index, tensor in enumerate(graph.inputs)}
    made = {id(x): (call, n) for call in calls(graph) for n, x in enumerate(call.outputs)}
    layers: list[Any] = []
    indices = []
    pending = list(tensors)
    seen = set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in inputs:
            # An integer input counts as well: the model casts what it receives.
            indices.append(inputs[id(tensor)])
        elif id(tensor) in made and keras.backend.is_float_dtype(tensor.dtype):
            call, index = made[id(tensor)]
            nested = graph_of(call.operation)
            if nested is not None:
                passing, reached = _trace_back(nested, [nested.outputs[index]])
                layers += passing
                pending += _inputs_at(call, reached)
            elif not isinstance(call.operation, keras.Layer):
                pending += call.inputs
            elif isinstance(call.operation, _PASSING_DATA_THROUGH):
                layers.append(call.operation)
                pending += call.inputs
    return layers, indices


def _inputs_at(call: Call, indices: list[int]) -> list[Any]:
    """Return the tensors that a nested model receives for some of its inputs."""
    if indices and len(call.inputs) != len(call.operation.inputs):  # a dict with more in it
        return call.inputs
    return [call.inputs[index] for index in indices]


def _receiving_spectra(model: Any) -> set[int]:
    """Return the `id`s of the layers that receive spectra which nothing has normalised."""
    receivers: set[int] = set()
    if any(isinstance(layer, SPECTRA) for layer in flatten_layers(model)):
        for graph in outermost_graphs(model):
            _propagate_spectra(graph, [], receivers)
    return receivers


def _propagate_spectra(model: Any, received: list[bool], receivers: set[int]) -> list[bool]:
    """Return which outputs of a model with a graph are spectra, and collect their receivers.

    Args:
        model: The model.
        received: Whether each of its inputs is one. If the list is shorter, the others are not.
        receivers: The set to which the `id`s of layers that receive spectra are added.
    """
    graph: Any = graph_of(model)
    spectra = {id(x) for x, is_one in zip(graph.inputs, received, strict=False) if is_one}
    for call in calls(graph):
        operation = call.operation
        inputs = [id(x) in spectra for x in call.inputs]
        is_nested = graph_of(operation) is not None
        if any(inputs) and isinstance(operation, keras.Layer) and not is_nested:
            receivers.update(map(id, flatten_layers(operation)))
        if is_nested:
            outputs = _propagate_spectra(operation, inputs, receivers)
        else:
            is_one = _makes_spectra(operation) or (any(inputs) and not _normalises(operation))
            outputs = [is_one] * len(call.outputs)
        spectra |= {id(x) for x, is_one in zip(call.outputs, outputs, strict=True) if is_one}
    return [id(x) in spectra for x in graph.outputs]


def _makes_spectra(operation: Any) -> bool:
    return isinstance(operation, keras.layers.STFTSpectrogram) and operation.mode in _LARGE_SPECTRA


def _normalises(operation: Any) -> bool:
    if isinstance(operation, keras.Layer):
        name = getattr(getattr(operation, "activation", None), "__name__", "")
    else:
        name = type(operation).__name__
    is_function = name.lower().replace("_", "") in (*_BOUNDED, *_LOGARITHMS)
    return is_function or isinstance(operation, (*_NORMALISING, *SPECTRA))
