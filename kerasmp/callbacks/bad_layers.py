"""Turns the counts of gradients that were not finite into layers, a cause and what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kerasmp.backend.keras_internals import own_variables
from kerasmp.policy.locations import paths

if TYPE_CHECKING:
    from collections.abc import Sequence


class LayerCount(NamedTuple):
    """In how many steps the gradients of a layer were not finite.

    Args:
        layer: The path of the layer.
        nonfinite: The number of steps in which a gradient of the layer was not finite.
        nan: The number of steps, among these, in which one had a NaN.
    """

    layer: str
    nonfinite: int
    nan: int

    def __str__(self) -> str:
        return f'"{self.layer}" ({"NaN" if self.nan else "inf"})'


def count_by_layer(
    model: Any, variables: Sequence[Any], nonfinite: Sequence[int], nan: Sequence[int]
) -> list[LayerCount]:
    """Return the counts of each layer that has trainable variables, in the order of the model.

    Args:
        model: The model.
        variables: The variables that the counts belong to. A variable that no layer of the model
            holds counts as a layer of its own.
        nonfinite: For each variable, the number of steps in which its gradient was not finite.
        nan: The same for a gradient with a NaN.
    """
    found: list[LayerCount] = []
    counts = {id(v): pair for v, *pair in zip(variables, nonfinite, nan, strict=True)}
    for layer, path in paths(model):
        held = [counts.pop(id(v)) for v in own_variables(layer) if id(v) in counts]
        if held:
            most = [max(int(count) for count in each) for each in zip(*held, strict=True)]
            found.append(LayerCount(path, *most))
    for variable in variables:
        if id(variable) in counts:
            path = getattr(variable, "path", variable.name)
            found.append(LayerCount(path, *map(int, counts[id(variable)])))
    return found


def in_every_layer(counts: Sequence[LayerCount]) -> bool:
    """Return whether the gradients of all layers were often not finite."""
    return bool(counts) and len(_often(counts)) == len(counts)


def _often(counts: Sequence[LayerCount]) -> list[LayerCount]:
    """Return the layers with more than half of the most steps. Others had a few steps of their own.

    So had a layer that is hit before the loss scale has come down.
    """
    most = max((each.nonfinite for each in counts), default=0)
    return [each for each in counts if 2 * each.nonfinite > most]


def explain(counts: Sequence[LayerCount], *, in_order: bool, by_loss: bool) -> list[str]:
    """Return sentences that name the layers, where it begins, and what to try next.

    Gradients flow from the last layer to the first, and so does an inf. It therefore begins at the
    last one of the layers whose gradients were often not finite, or in operations after that.

    Args:
        counts: The counts of all layers, in the order of the model.
        in_order: Whether this is the order in which the model calls them.
        by_loss: Whether the loss was not finite either, which explains the gradients.
    """
    bad = _often(counts)
    if not bad:
        return []
    names = ", ".join(map(str, reversed(bad[-3:]))) + (", ..." if bad[3:] else "")
    sentences = [f"Gradients were inf or NaN in {len(bad)} of {len(counts)} layers: {names}."]
    if by_loss:
        return sentences
    place = "in these layers, or between them and the loss"
    if len(bad) == len(counts):
        place = "in the loss, in the outputs, or in the last layer"
    elif in_order:
        place = f'in "{bad[-1].layer}", or in what follows it'
        sentences.append(f"They begin {place}: in later layers they were finite.")
    cause = (
        "a division by 0, or a root or logarithm of 0"
        if any(each.nan for each in bad)
        else "an operation with large gradients, and compute it in float32"
    )
    return [*sentences, f"If a lower loss scale does not help, look {place} for {cause}."]
