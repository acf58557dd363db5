"""Outputs in float16, and losses that take them for probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import graph_of
from kerasmp.diagnosis.finding import Finding
from kerasmp.policy.locations import final_layers
from kerasmp.policy.safe import PROBABILITIES, activation_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_REMEDY = (
    'Let it compute in float32: make it a kerasmp.layers.DenseHead, or give it dtype="float32". '
    "kerasmp.convert(model) does so for layers that are not of your own."
)
# From probabilities unless `from_logits` says otherwise.
_CROSS_ENTROPIES = (
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.SparseCategoricalCrossentropy,
)


def findings(model: Any, dtypes: dict[int, str]) -> list[Finding]:
    """Return what is wrong with the outputs of a model; nothing where no graph tells.

    Args:
        model: A Keras model.
        dtypes: Of its symbolic tensors.
    """
    graph = graph_of(model)
    if graph is None:
        return []
    half = [dtypes[id(tensor)] == "float16" for tensor in graph.outputs]
    return [*_heads(model, dtypes), *_losses(model, half)] if any(half) else []


def _heads(model: Any, dtypes: dict[int, str]) -> Iterator[Finding]:
    cast_later = getattr(model, "_output_dtype", None) == "float32"  # kerasmp.Model, by its policy
    for layer in final_layers(model):
        if layer.compute_dtype != "float16" or _gives_float32(layer, dtypes):
            continue
        probabilities = _gives_probabilities(layer)
        if probabilities or not cast_later:
            yield Finding(
                "error" if probabilities else "warning",
                layer.path or layer.name,
                "float16-head",
                "Its probabilities are float16: small ones become 0, and the gradient of their "
                "logarithm overflows."
                if probabilities
                else "It makes a final output in float16, which rounds what losses, metrics and "
                "predictions see.",
                _REMEDY,
            )


def _losses(model: Any, half: list[bool]) -> Iterator[Finding]:
    losses = keras.tree.flatten(getattr(model, "loss", None))
    for number, loss in enumerate(losses):
        fits = len(losses) == len(half)
        if any(half[number : number + 1] if fits else half) and _from_probabilities(loss):
            name = loss if isinstance(loss, str) else getattr(loss, "name", None) or loss.__name__
            yield Finding(
                "error",
                model.name,
                "float16-probabilities",
                f'The loss "{name}" takes probabilities, and they are float16: its gradients '
                "overflow as soon as the loss is scaled.",
                "Give it float32 probabilities, or better logits, with from_logits=True.",
            )


def _gives_float32(layer: Any, dtypes: dict[int, str]) -> bool:
    tensors = [t for t in keras.tree.flatten(_output(layer)) if id(t) in dtypes]
    return bool(tensors) and all(dtypes[id(tensor)] != "float16" for tensor in tensors)


def _output(layer: Any) -> Any:
    try:
        return layer.output
    except (AttributeError, ValueError):  # called more than once, or not on its own
        return []


def _gives_probabilities(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Softmax) or activation_name(layer) in PROBABILITIES


def _from_probabilities(loss: Any) -> bool:
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if isinstance(loss, _CROSS_ENTROPIES):
        return not loss.from_logits
    names = {cls.__name__ for cls in _CROSS_ENTROPIES}
    plain = str(getattr(loss, "__name__", "")).replace("_", "")
    return plain in {name.lower() for name in names}
