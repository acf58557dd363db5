"""Keeps conversions of a layer in order: they must be undone from the last one to the first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

from kerasmp.backend.by_identity import ByIdentity
from kerasmp.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kerasmp.policy.apply import Undo


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """One conversion of a model.

    Args:
        model: The name of the model.
        number: Which conversion of this model it is, from 1.
        policy: What the model was converted to, in words.
        order: Grows from each conversion to the next, of any model.
    """

    model: str
    number: int
    policy: str
    order: int

    def __str__(self) -> str:
        return f'conversion {self.number} of "{self.model}", to {self.policy}'


_COUNTER = itertools.count()
# How many conversions of a model have begun.
_BEGUN: ByIdentity[int] = ByIdentity()
# The conversions of a layer that are in effect, in order. Reports do not hold these, since a
# conversion stays in effect when its report is dropped.
_ACTIVE: ByIdentity[list[Conversion]] = ByIdentity()


def begin(model: Any, layers: Iterable[Any], policy: str, undo: Undo) -> Conversion:
    """Record that a conversion of a model and its layers is in effect.

    Args:
        model: The model.
        layers: The model and all layers in it.
        policy: What the model was converted to, in words.
        undo: Gets the functions that remove the record.
    """
    number = _BEGUN[model] = (_BEGUN.get(model) or 0) + 1
    conversion = Conversion(model.name, number, policy, next(_COUNTER))
    for layer in layers:
        active = _ACTIVE.get(layer)
        if active is None:
            active = _ACTIVE[layer] = []
        undo.append(functools.partial(_end, active, conversion))
        active.append(conversion)
    return conversion


def refuse_out_of_order(conversion: Conversion, layers: Iterable[Any]) -> None:
    """Raise if a conversion was undone already, or a later one has changed one of its layers.

    Args:
        conversion: The conversion.
        layers: Its layers.

    Raises:
        PolicyError: If so.
    """
    active = {each for layer in layers for each in _ACTIVE.get(layer) or []}
    if conversion not in active:
        raise PolicyError(
            "This conversion was undone already.",
            received=f"a second restore() of {conversion}",
            expected="one restore() of each report",
            fix="To convert again, call convert again. To undo an earlier conversion, call "
            "restore() on its own report.",
        )
    last = max(active, key=lambda each: each.order)
    if last is not conversion:
        raise PolicyError(
            "A later conversion has changed these layers, and must be undone first.",
            received=f"restore() of {conversion}",
            expected=f"first restore() of {last}",
            fix="Call restore() on the report of that conversion. If that report is gone, there is "
            'no exact way back: convert(model, "float32") makes all layers compute in float32.',
        )


def _end(active: list[Conversion], conversion: Conversion) -> None:
    if conversion in active:
        active.remove(conversion)
