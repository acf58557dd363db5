"""Finds float16 outputs, and losses that expect probabilities and receive them in float16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import graph_of
from kerasmp.policy.locations import final_layers, paths, producers_of
from kerasmp.policy.safe import PROBABILITIES, activation_name
from kerasmp.probe.finding import Finding
from kerasmp.probe.remedies import CAST
from kerasmp.probe.values import values_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_REMEDY = (
    'Compute it in float32: use a kerasmp.layers.DenseHead, or pass dtype="float32". '
    "kerasmp.convert(model) does this for all but user-defined layers."
)
# They take probabilities unless `from_logits` is True.
_CROSS_ENTROPIES = (
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.SparseCategoricalCrossentropy,
)


def findings(model: Any, dtypes: dict[int, str]) -> list[Finding]:
    """Return the problems with the outputs of a model. Without a graph there are none.

    Args:
        model: A Keras model.
        dtypes: The dtype of each symbolic tensor, by the tensor's id.
    """
    graph = graph_of(model)
    if graph is None:
        return []
    half = [dtypes[id(tensor)] == "float16" for tensor in graph.outputs]
    return [*_heads(model, graph, dtypes), *_losses(model, half)] if any(half) else []


def _heads(model: Any, graph: Any, dtypes: dict[int, str]) -> Iterator[Finding]:
    # The policy of a kerasmp.Model may cast its outputs.
    cast_later = getattr(model, "_output_dtype", None) == "float32"
    trained = {id(layer) for layer in producers_of(graph, _outputs_with_loss(model, graph))}
    is_compiled = bool(getattr(model, "compiled", False))
    path_of = {id(layer): path for layer, path in paths(model)}
    for layer in final_layers(model):
        if layer.compute_dtype != "float16" or _returns_float32(layer, dtypes):
            continue
        probabilities = _returns_probabilities(layer)
        if probabilities or not cast_later:
            # A model that is not compiled may be trained with any loss, or be part of another.
            is_trained = id(layer) in trained and (probabilities or is_compiled)
            place = path_of[id(layer)]
            yield _head(place, probabilities=probabilities, is_trained=is_trained)


def heads_that_ran(loss: Any, steps: Iterable[Any], outputs: Sequence[Any]) -> Iterator[Finding]:
    """Yield findings for the heads of a compiled model that no graph shows, from a run of it.

    Args:
        loss: The loss of the model, or its losses in the structure of the outputs.
        steps: The steps that have run.
        outputs: The tensors that the model has returned.
    """
    losses = keras.tree.flatten(loss)
    if len(losses) != len(outputs):
        losses = [loss] * len(outputs)
    half = {
        id(x): is_trained is not None
        for x, is_trained in zip(outputs, losses, strict=True)
        if keras.backend.standardize_dtype(x.dtype) == "float16"
    }
    for step in steps:
        for returned in half.keys() & {id(value.half) for value in values_in(step.outputs)}:
            name = type(step.operation).__name__.lower()
            is_layer = isinstance(step.operation, keras.Layer)
            yield _head(
                step.place,
                probabilities=_returns_probabilities(step.operation)
                if is_layer
                else name in PROBABILITIES,
                is_trained=half[returned],
                remedy=_REMEDY if is_layer else CAST,
            )


def _head(place: str, *, probabilities: bool, is_trained: bool, remedy: str = _REMEDY) -> Finding:
    reason = (
        "Its probabilities are float16: small ones become 0, and the gradient of their logarithm "
        "may overflow."
        if probabilities
        else "It returns a model output in float16, so losses, metrics and predictions are rounded."
    )
    without_loss = (
        "It returns a model output in float16, so metrics and predictions are rounded, and a loss "
        "would be."
    )
    return Finding(
        ("error" if probabilities else "warning") if is_trained else "hint",
        place,
        "float16-head",
        reason if is_trained else without_loss,
        remedy,
    )


def _outputs_with_loss(model: Any, graph: Any) -> list[Any]:
    """Return the outputs of a model's graph from which a loss may be computed.

    These are all outputs, unless `compile` was given losses for some of them only. A user's class
    may compute a loss from any output in its own code.
    """
    outputs, loss = graph.output, getattr(model, "loss", None)
    losses: dict[Any, Any] = {}
    named: dict[Any, Any] = {}
    if isinstance(loss, dict):
        # The keys are those of the outputs, or else the names of the layers that make these.
        by_layer = dict(zip(graph.output_names, graph.outputs, strict=False))
        losses, named = loss, outputs if isinstance(outputs, dict) else by_layer
    elif isinstance(loss, list | tuple) and len(loss) == len(graph.outputs):
        losses, named = dict(enumerate(loss)), dict(enumerate(graph.outputs))
    is_user_defined = type(model).__module__.partition(".")[0] not in {"keras", "kerasmp"}
    if is_user_defined or len(named) != len(graph.outputs) or not losses.keys() <= named.keys():
        return list(graph.outputs)
    return [tensor for name, tensor in named.items() if losses.get(name) is not None]


def _losses(model: Any, half: list[bool]) -> Iterator[Finding]:
    losses = keras.tree.flatten(getattr(model, "loss", None))
    one_each = len(losses) == len(half)
    for index, loss in enumerate(losses):
        if (half[index] if one_each else any(half)) and _takes_probabilities(loss):
            name = loss if isinstance(loss, str) else getattr(loss, "name", None) or loss.__name__
            yield Finding(
                "warning",
                model.name,
                "float16-probabilities",
                f'The loss "{name}" receives float16 probabilities: small ones become 0, and the '
                "gradient of their logarithm may overflow when the loss is scaled.",
                "Pass logits and from_logits=True, or at least float32 probabilities.",
            )


def _returns_float32(layer: Any, dtypes: dict[int, str]) -> bool:
    tensors = [t for t in keras.tree.flatten(_output(layer)) if id(t) in dtypes]
    return bool(tensors) and all(dtypes[id(tensor)] != "float16" for tensor in tensors)


def _output(layer: Any) -> Any:
    try:
        return layer.output
    except (AttributeError, ValueError):  # called several times, or only inside another layer
        return []


def _returns_probabilities(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Softmax) or activation_name(layer) in PROBABILITIES


def _takes_probabilities(loss: Any) -> bool:
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if isinstance(loss, _CROSS_ENTROPIES):
        return not loss.from_logits
    name = str(getattr(loss, "__name__", "")).replace("_", "")
    return name in {cls.__name__.lower() for cls in _CROSS_ENTROPIES}
