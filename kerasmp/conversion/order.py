"""Which conversions of a layer stand: they are undone from the last one to the first."""

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

_ORDER = itertools.count()


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """One conversion of a model.

    Args:
        model: The name of the model.
        number: Which conversion of this model it is, from 1.
        policy: What it was converted to, in words.
        order: Grows from one conversion to the next, of whichever model.
    """

    model: str
    number: int
    policy: str
    order: int

    def __str__(self) -> str:
        return f'conversion {self.number} of "{self.model}", to {self.policy}'


@dataclasses.dataclass
class _Known:
    """What is known of a layer: its conversions that stand, in order, and how many it has begun."""

    standing: list[Conversion] = dataclasses.field(default_factory=list)
    begun: int = 0


# Of layers. Kept apart from reports, which may be dropped: what they have changed stands all the
# same.
_KNOWN: ByIdentity[_Known] = ByIdentity()


def _known_of(layer: Any) -> _Known:
    known = _KNOWN.get(layer)
    if known is None:
        known = _KNOWN[layer] = _Known()
    return known


def begin(model: Any, layers: Iterable[Any], policy: str, undo: Undo) -> Conversion:
    """Note that a conversion of a model and its layers stands.

    Args:
        model: The model.
        layers: All that it has in its hands, the model too.
        policy: What it converts to, in words.
        undo: Is given what notes that it stands no more.
    """
    known = _known_of(model)
    known.begun += 1
    conversion = Conversion(model.name, known.begun, policy, next(_ORDER))
    for layer in layers:
        standing = _known_of(layer).standing
        undo.append(functools.partial(_end, standing, conversion))
        standing.append(conversion)
    return conversion


def refuse_out_of_order(conversion: Conversion, layers: Iterable[Any]) -> None:
    """Raise if a conversion is undone already, or has one of its layers changed by a later one.

    Args:
        conversion: The conversion.
        layers: Its layers.

    Raises:
        PolicyError: Then.
    """
    standing = {each for layer in layers for each in _known_of(layer).standing}
    if conversion not in standing:
        raise PolicyError(
            "This conversion is undone already.",
            received=f"a second restore() of {conversion}",
            expected="one restore() of each report",
            fix="Call convert again to convert again. What an earlier conversion has changed, its "
            "own report restores.",
        )
    last = max(standing, key=lambda each: each.order)
    if last is not conversion:
        raise PolicyError(
            "A later conversion has changed these layers again, and is to be undone first.",
            received=f"restore() of {conversion}",
            expected=f"first restore() of {last}",
            fix="Call it on the report of that one. If that report is gone, there is no exact way "
            'back: convert(model, "float32") lets everything compute in float32.',
        )


def _end(standing: list[Conversion], conversion: Conversion) -> None:
    if conversion in standing:
        standing.remove(conversion)
