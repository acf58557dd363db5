"""Optimizers inside of optimizers, which Keras has no common way to reach or to replace."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from collections.abc import Mapping


def optimizer_chain(optimizer: Any) -> list[Any]:
    """Return the optimizer and all that it holds, at any depth, each once.

    Those of a `MultiOptimizer` are among them, and those that a user's own optimizer keeps in an
    attribute, a list or a dict: how it names them is its own affair.
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
        # Most of what they hold are variables, by the hundred.
        waiting.extend([value for value in inside if isinstance(value, holders)])
    return found


def is_stock(optimizer: Any) -> bool:
    """Return whether an optimizer is of a class of Keras's own, and no method of it is replaced."""
    own = type(optimizer).__module__.startswith("keras.")
    return own and not has_replaced_methods(optimizer)


def overrides_stateless_apply(optimizer: Any) -> bool:
    """Return whether `stateless_apply` is another one than that of all optimizers of Keras."""
    own = getattr(optimizer.stateless_apply, "__func__", None)
    return own is not keras.optimizers.Optimizer.stateless_apply


def has_replaced_methods(optimizer: Any) -> bool:
    """Return whether a method was put into this one object in the place of its class's."""
    kind: Any = type(optimizer)
    return not _methods(kind).isdisjoint(vars(optimizer))


@functools.cache
def _methods(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def copy_with_settings(optimizer: Any, settings: Mapping[int, Mapping[str, Any]]) -> Any:
    """Return an optimizer with the same variables and other settings. The given one is not changed.

    Args:
        optimizer: The optimizer.
        settings: Attributes by the `id` of the optimizer, or of one that it holds at any depth. All
            optimizers that it holds are copied.
    """
    copies: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, keras.optimizers.Optimizer):
            if id(value) not in copies:
                copies[id(value)] = copy = object.__new__(type(value))
                vars(copy).update({name: copied(each) for name, each in vars(value).items()})
                vars(copy).update(settings.get(id(value), {}))
            return copies[id(value)]
        if not isinstance(value, (dict, list, tuple)) or not optimizer_chain(value):
            return value
        if isinstance(value, dict):
            return {key: copied(each) for key, each in value.items()}
        return [copied(each) for each in value]

    return copied(optimizer)
