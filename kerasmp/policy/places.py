"""Where a layer stands in a model: what the rules must know of it beyond its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from kerasmp.backend.keras_graph import calls, children, graph_of, has_mask, producer

if TYPE_CHECKING:
    from collections.abc import Iterator

# What hands its input on, element by element, so that the layer before it makes the output.
HANDING_ON = (
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


class Place(NamedTuple):
    """What is around a layer.

    Args:
        path: Keras's path of the layer; where Keras gives it none, the holder's and its name.
        holder: The layer or model that holds it; None for the model itself.
        final: Whether the model's outputs come from it.
        masked: Whether a mask comes with its input; None where no graph tells.
        half: The half precision that the policy would have it compute in, "" for none.
    """

    path: str
    holder: Any = None
    final: bool = False
    masked: bool | None = None
    half: str = ""


def places(model: Any) -> Iterator[tuple[Any, Place]]:
    """Yield the model and each layer in it, at any depth, once, with its place.

    Holders come before what they hold.
    """
    final = {id(layer) for layer in final_layers(model)}
    graphs = [model]
    waiting: list[tuple[Any, Place]] = [(model, Place(model.name))]
    seen = set()
    found = []
    while waiting:
        layer, place = waiting.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        found.append((layer, place))
        graphs.append(layer)
        inside = [
            (part, Place(part.path or _join(layer, model, place, part), layer))
            for part in children(layer)
        ]
        waiting = inside + waiting
    masked = _masks(graphs)
    for layer, place in found:
        yield layer, place._replace(final=id(layer) in final, masked=masked.get(id(layer)))


def final_layers(model: Any) -> list[Any]:
    """Return the layers that make the model's outputs; none where no graph tells.

    Layers that only rearrange or drop what they are given are among them, and so is the one before.
    Through an operation that is no layer, such as `outputs * 2`, all layers before it count.
    """
    graph = graph_of(model)
    if graph is None:
        return []
    found: list[Any] = []
    makers = {id(out): call for call in calls(graph) for out in call.outputs}
    waiting = list(graph.outputs)
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
        if not is_layer or isinstance(operation, HANDING_ON):
            waiting += makers[id(tensor)].inputs
    return found


def _join(holder: Any, model: Any, place: Place, part: Any) -> str:
    # As Keras's own paths, which begin with the names of a model's layers.
    return str(part.name) if holder is model else f"{place.path}/{part.name}"


def _masks(graphs: list[Any]) -> dict[int, bool]:
    masked: dict[int, bool] = {}
    for graph in graphs:
        for call in calls(graph):
            key = id(call.operation)
            masked[key] = masked.get(key, False) or any(has_mask(each) for each in call.inputs)
    return masked
