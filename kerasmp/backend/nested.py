"""Optimizers inside optimizers, which Keras has no common way to find or to replace."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from collections.abc import Mapping


def optimizer_chain(optimizer: Any) -> list[Any]:
    """Return the optimizer and all optimizers inside it, at any depth, each once.

    This includes those of a `MultiOptimizer`, and those that a user-defined optimizer keeps in an
    attribute, a list or a dict of any name.
    """
    holders = (keras.optimizers.Optimizer, dict, list, tuple)
    found, waiting, seen = [], [optimizer], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        inside = each
        if isinstance(each, keras.optimizers.Optimizer):
            found.append(each)
            inside = vars(each).values()
        elif isinstance(each, dict):
            inside = each.values()
        # Filtered here, because most of the values are variables, hundreds of them.
        waiting.extend([value for value in inside if isinstance(value, holders)])
    return found


def is_stock(optimizer: Any) -> bool:
    """Return whether an optimizer is of one of Keras's classes and has no replaced method."""
    of_keras = type(optimizer).__module__.startswith("keras.")
    return of_keras and not has_replaced_methods(optimizer)


def overrides_stateless_apply(optimizer: Any) -> bool:
    """Return whether an optimizer has a `stateless_apply` other than that of Keras's base class."""
    own = getattr(optimizer.stateless_apply, "__func__", None)
    return own is not keras.optimizers.Optimizer.stateless_apply


def has_replaced_methods(optimizer: Any) -> bool:
    """Return whether a method of this object, not of its class, has been replaced."""
    cls: Any = type(optimizer)
    return not _methods(cls).isdisjoint(vars(optimizer))


@functools.cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


def copy_with_settings(optimizer: Any, settings: Mapping[int, Mapping[str, Any]]) -> Any:
    """Return a copy of an optimizer with the same variables and some other settings.

    Args:
        optimizer: The optimizer. It does not change.
        settings: Attributes by the `id` of the optimizer, or of one inside it at any depth. The
            copy contains copies of all optimizers inside.
    """
    copies: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, keras.optimizers.Optimizer):
            if id(value) not in copies:
                copies[id(value)] = new = object.__new__(type(value))
                vars(new).update({name: copy(each) for name, each in vars(value).items()})
                vars(new).update(settings.get(id(value), {}))
            return copies[id(value)]
        if not isinstance(value, (dict, list, tuple)) or not optimizer_chain(value):
            return value
        if isinstance(value, dict):
            return {key: copy(each) for key, each in value.items()}
        return [copy(each) for each in value]

    return copy(optimizer)
