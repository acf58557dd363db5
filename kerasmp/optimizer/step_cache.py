"""Eager steps on JAX, each compiled once: what they depend on, and when they are out of date."""

from __future__ import annotations

import functools
import numbers
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.nested import copy_with_settings, optimizer_chain
from kerasmp.backend.optimizer_internals import learning_rate_functions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PLAIN = (numbers.Number, str, type(None))
# Each compiled step holds its program. A loop with several kinds of steps, as for a GAN, needs a
# few of them.
_MAX_STEPS = 16


class StepCache:
    """The compiled steps that were used last, by what they depend on."""

    def __init__(self) -> None:
        self._steps: dict[Any, Any] = {}

    def get(self, key: Any, compile_step: Callable[[], Any]) -> Any:
        """Return the step for a key; if there is none, keep and return `compile_step()`."""
        step = self._steps.pop(key, None) or compile_step()
        self._steps[key] = step
        if len(self._steps) > _MAX_STEPS:
            del self._steps[next(iter(self._steps))]
        return step


class _Identity:
    """A key for an object that may not be hashable, equal for the same object only."""

    def __init__(self, value: Any) -> None:
        self._value = value  # kept alive, so that no other object gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def trace_constants(optimizer: Any) -> tuple[Any, ...]:
    """Return the settings that become constants in a compiled step, as a key.

    If one of them is replaced by another object, the key changes. It does not change if a dict, an
    array, a schedule or a user-defined object changes inside, or a value that a function reads
    while the step is traced.

    Args:
        optimizer: The inner optimizer.

    Returns:
        All attributes: numbers, strings and lists of them by value, all others by identity.
    """
    key: list[Any] = []
    for inside in optimizer_chain(optimizer):
        for name, value in vars(inside).items():
            if isinstance(value, _PLAIN):
                key.append((name, value))
            elif isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value):
                key.append((name, *value))
            else:
                key.append((name, _Identity(value)))
    return tuple(key)


def current_rates(optimizer: Any) -> list[Any]:
    """Return what each learning-rate function inside an optimizer returns now."""
    rates = [function() for _, function in learning_rate_functions(optimizer)]
    return [rate.value if isinstance(rate, keras.Variable) else rate for rate in rates]


def with_rates(optimizer: Any, rates: Sequence[Any]) -> Any:
    """Return an optimizer with the same variables whose learning-rate functions return `rates`.

    A compiled step gets the rates as arguments, and so serves all rates. The given optimizer is
    not changed.

    Args:
        optimizer: The inner optimizer.
        rates: One for each learning-rate function, from `current_rates`.
    """
    if not rates:
        return optimizer
    pairs = zip(learning_rate_functions(optimizer), rates, strict=True)
    return copy_with_settings(
        optimizer, {id(o): {"_learning_rate": functools.partial(_return, r)} for (o, _), r in pairs}
    )


def _return(value: Any) -> Any:
    return value
