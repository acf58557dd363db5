"""Turns the counts of gradients that were not finite into layers, a cause and what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kerasmp.backend.keras_internals import own_variables
from kerasmp.policy.locations import locations

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
    found: dict[str, LayerCount] = {}
    counts = {id(v): pair for v, *pair in zip(variables, nonfinite, nan, strict=True)}
    for layer, location in locations(model):
        held = [counts.pop(id(v)) for v in own_variables(layer) if id(v) in counts]
        if held:
            most = [max(int(count) for count in each) for each in zip(*held, strict=True)]
            found[location.path] = LayerCount(location.path, *most)
    for variable in variables:
        if id(variable) in counts:
            path = getattr(variable, "path", variable.name)
            found[path] = LayerCount(path, *map(int, counts[id(variable)]))
    return list(found.values())


def in_every_layer(counts: Sequence[LayerCount]) -> bool:
    """Return whether the gradients of all layers were not finite in equally many steps."""
    return len({each.nonfinite for each in counts}) == 1 and counts[0].nonfinite > 0


def explain(counts: Sequence[LayerCount], *, by_loss: bool) -> list[str]:
    """Return sentences that name the layers, where it begins, and what to try next.

    Gradients flow from the last layer to the first, and so does an inf. The layer where it begins
    is therefore the last one of those whose gradients were most often not finite.

    Args:
        counts: The counts of all layers, in the order of the model.
        by_loss: Whether the loss was not finite either, which explains the gradients.
    """
    most = max((each.nonfinite for each in counts), default=0)
    if not most:
        return []
    bad = [each for each in counts if each.nonfinite == most]
    first = bad[-1]
    names = ", ".join(map(str, reversed(bad[-3:]))) + (", ..." if bad[3:] else "")
    sentences = [f"Gradients were inf or NaN in {len(bad)} of {len(counts)} layers: {names}."]
    if in_every_layer(counts) and len(counts) > 1:
        sentences.append(
            f'As "{first.layer}" is the last layer, they come from the loss or from its outputs.'
        )
    elif first is not counts[-1]:
        sentences.append(f'They begin at "{first.layer}": those of later layers were finite.')
    if by_loss:
        return sentences
    sentences.append(
        f'NaN in "{first.layer}" comes from a division by 0, a root or logarithm of 0, or an inf '
        "before it."
        if first.nan
        else f'If a lower scale does not help, let "{first.layer}" compute in float32.'
    )
    return sentences
