"""Where a layer stands in a model: what the rules must know of it beyond its class."""

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

# What hands its input on, element by element, so that the layer before it makes the output.
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
# What hands data on to those that need it as it comes, or scales it for them.
_PASSING_DATA_THROUGH = (*PASSING_THROUGH, keras.layers.Concatenate, keras.layers.Rescaling)
# What is given data, and makes something else of two numbers that half precision takes for one.
TAKING_DATA = (
    keras.layers.CategoryEncoding,
    keras.layers.Discretization,
    keras.layers.Masking,
    keras.layers.Normalization,
)

SPECTRA = (keras.layers.MelSpectrogram, keras.layers.STFTSpectrogram)
# Of STFTSpectrogram: "log" and "angle" are small numbers, as are the decibels of MelSpectrogram.
_LARGE_SPECTRA = ("imag", "magnitude", "psd", "real", "stft")
# What makes small numbers of any: by class, and by the name of an activation or operation. Not
# BatchNormalization, which hands on what it is given until it has been trained.
_NORMALISING = (
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.RMSNormalization,
    keras.layers.Softmax,
    keras.layers.UnitNormalization,
)
_BOUNDED = ("hard_sigmoid", "hard_tanh", "sigmoid", "softmax", "softsign", "tanh")
_LOGARITHMS = ("log", "log10", "log1p", "log2", "log_softmax")


class Location(NamedTuple):
    """What is around a layer.

    Args:
        path: Keras's path of the layer; where Keras gives it none, the holder's and its name.
        holder: The layer or model that holds it; None for the model itself.
        final: Whether the model's outputs come from it.
        masked: Whether a mask comes with its input; None where no graph tells.
        spectra: Whether spectra come with its input that nothing has normalised.
        feeds: The layers that need data as it comes, and are given it by this one.
        half: The half precision that the policy would have it compute in, "" for none.
        depth: How many layers and models hold it; 0 for the model itself.
    """

    path: str
    holder: Any = None
    final: bool = False
    masked: bool | None = None
    spectra: bool = False
    feeds: tuple[Any, ...] = ()
    half: str = ""
    depth: int = 0


def locations(model: Any) -> Iterator[tuple[Any, Location]]:
    """Yield the model and each layer in it, at any depth, once, with its place.

    Holders come before what they hold.
    """
    final = {id(layer) for layer in final_layers(model)}
    graphs = [model]
    waiting: list[tuple[Any, Location]] = [(model, Location(model.name))]
    seen = set()
    found = []
    while waiting:
        layer, location = waiting.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        found.append((layer, location))
        graphs.append(layer)
        inside = [
            (
                part,
                Location(
                    part.path or _join(layer, model, location, part),
                    layer,
                    depth=location.depth + 1,
                ),
            )
            for part in children(layer)
        ]
        waiting = inside + waiting
    masked = _masks(graphs)
    spectra = _taking_spectra(model)
    feeds = _feeds(graphs)
    for layer, location in found:
        key = id(layer)
        yield (
            layer,
            location._replace(
                final=key in final,
                masked=masked.get(key),
                spectra=key in spectra,
                feeds=feeds.get(key, ()),
            ),
        )


def final_layers(model: Any) -> list[Any]:
    """Return the layers that make the model's outputs; none where no graph tells.

    Layers that only rearrange or drop what they are given are among them, and so is the one before.
    Through an operation that is no layer, such as `outputs * 2`, all layers before it count. Of a
    model without a `call`, whose train step takes what its parts return, all that make their
    outputs.
    """
    graph = graph_of(model)
    if graph is None:
        parts = called_parts(model)
        return [layer for x in parts if x is not model for layer in final_layers(x)]
    return producers_of(graph, graph.outputs)


def producers_of(graph: Any, tensors: Iterable[Any]) -> list[Any]:
    """Return the layers that make tensors of a model's graph; see `final_layers`.

    Args:
        graph: The functional model.
        tensors: Tensors in it.
    """
    found: list[Any] = []
    makers = {id(out): call for call in calls(graph) for out in call.outputs}
    waiting = list(tensors)
    seen = set()
    while waiting:
        tensor = waiting.pop()
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
            waiting += makers[id(tensor)].inputs
    return found


def _join(holder: Any, model: Any, location: Location, part: Any) -> str:
    # As Keras's own paths, which begin with the names of a model's layers.
    return str(part.name) if holder is model else f"{location.path}/{part.name}"


def _masks(graphs: list[Any]) -> dict[int, bool]:
    masked: dict[int, bool] = {}
    for graph in graphs:
        for call in calls(graph):
            key = id(call.operation)
            masked[key] = masked.get(key, False) or any(has_mask(each) for each in call.inputs)
    return masked


def _feeds(graphs: list[Any]) -> dict[int, tuple[Any, ...]]:
    """Return which layers that need data as it comes are given it by each that hands it on."""
    found: dict[int, tuple[Any, ...]] = {}
    for graph in graphs:
        for takers, tensors in _taken(graph):
            for layer in _handing_on(graph, tensors)[0]:
                found[id(layer)] = (*found.get(id(layer), ()), *takers)
    return found


def _taken(model: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield layers that need data as it comes, and the tensors of a model's graph that they take.

    Those in a model inside take what it is given and hands on to them.
    """
    for call in calls(model):
        if graph_of(call.operation) is not None:
            for takers, tensors in _taken(call.operation):
                _, numbers = _handing_on(call.operation, tensors)
                yield takers, _given(call, numbers)
        elif isinstance(call.operation, keras.Layer):
            is_rows = isinstance(call.operation, keras.layers.Embedding)
            takers = [call.operation] if is_rows else takers_in(call.operation)
            if takers:
                yield takers, call.inputs


def _handing_on(model: Any, tensors: Iterable[Any]) -> tuple[list[Any], list[int]]:
    """Return what hands data on to tensors of a model's graph.

    Args:
        model: The model.
        tensors: Tensors in its graph.

    Returns:
        The layers, those in models inside among them, and the numbers of the model's inputs that
        the data may come from. Whole numbers are rounded by no layer.
    """
    graph: Any = graph_of(model)
    inputs = {id(tensor): number for number, tensor in enumerate(graph.inputs)}
    made = {id(x): (call, n) for call in calls(graph) for n, x in enumerate(call.outputs)}
    layers: list[Any] = []
    numbers = []
    waiting = list(tensors)
    seen = set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in inputs:
            # Into whole numbers, too: the model casts what it is given.
            numbers.append(inputs[id(tensor)])
        elif id(tensor) in made and keras.backend.is_float_dtype(tensor.dtype):
            call, number = made[id(tensor)]
            inside = graph_of(call.operation)
            if inside is not None:
                within, given = _handing_on(inside, [inside.outputs[number]])
                layers += within
                waiting += _given(call, given)
            elif not isinstance(call.operation, keras.Layer):
                waiting += call.inputs
            elif isinstance(call.operation, _PASSING_DATA_THROUGH):
                layers.append(call.operation)
                waiting += call.inputs
    return layers, numbers


def _given(call: Call, numbers: list[int]) -> list[Any]:
    """Return what a model inside is given for some of its inputs."""
    if numbers and len(call.inputs) != len(call.operation.inputs):  # a dict with more in it
        return call.inputs
    return [call.inputs[number] for number in numbers]


def takers_in(layer: Any) -> list[Any]:
    """Return each layer in a layer that needs data as it comes, the layer itself among them."""
    return [part for part in flatten_layers(layer) if isinstance(part, TAKING_DATA)]


def _taking_spectra(model: Any) -> set[int]:
    """Return the `id`s of the layers that are given spectra which nothing has normalised."""
    takers: set[int] = set()
    if any(isinstance(layer, SPECTRA) for layer in flatten_layers(model)):
        for graph in outermost_graphs(model):
            _spread(graph, [], takers)
    return takers


def _spread(model: Any, given: list[bool], takers: set[int]) -> list[bool]:
    """Return which outputs of a model with a graph are spectra, and add the layers that take such.

    Args:
        model: The model.
        given: Whether each of its inputs is one; none of them, if there are fewer.
        takers: Is added to.
    """
    graph: Any = graph_of(model)
    large = {id(x) for x, is_large in zip(graph.inputs, given, strict=False) if is_large}
    for call in calls(graph):
        taken = [id(x) in large for x in call.inputs]
        if any(taken):
            takers.update(id(x) for x in _of(call.operation))
        if graph_of(call.operation) is not None:
            made = _spread(call.operation, taken, takers)
        else:
            is_large = _makes_large(call.operation) or (
                any(taken) and not _makes_small(call.operation)
            )
            made = [is_large] * len(call.outputs)
        large |= {id(x) for x, is_large in zip(call.outputs, made, strict=True) if is_large}
    return [id(x) in large for x in graph.outputs]


def _of(operation: Any) -> list[Any]:
    """Return a layer with what it holds; nothing of a model, which is gone through by itself."""
    is_whole = isinstance(operation, keras.Layer) and graph_of(operation) is None
    return flatten_layers(operation) if is_whole else []


def _makes_large(operation: Any) -> bool:
    return isinstance(operation, keras.layers.STFTSpectrogram) and operation.mode in _LARGE_SPECTRA


def _makes_small(operation: Any) -> bool:
    if not isinstance(operation, keras.Layer):
        names = (*_BOUNDED, *_LOGARITHMS)
        return type(operation).__name__.lower() in {name.replace("_", "") for name in names}
    activation = getattr(getattr(operation, "activation", None), "__name__", "")
    return isinstance(operation, (*_NORMALISING, *SPECTRA)) or activation in {
        *_BOUNDED,
        *_LOGARITHMS,
    }
