"""Eager steps on JAX, each compiled once: what they depend on, and when they are out of date."""

from __future__ import annotations

import functools
import numbers
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_internals import learning_rate_functions
from kerasmp.backend.nested import optimizer_chain, standing_in
from kerasmp.optimizer.causes import Forgetful

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PLAIN = (numbers.Number, str, type(None))
# A compiled step holds its program. Loops that take turns, a GAN's say, need a few.
_KEPT_STEPS = 16


class StepCache(Forgetful):
    """Eager steps that JAX has compiled, by what they depend on; the last few that were used."""

    def __init__(self) -> None:
        self._steps: dict[Any, Any] = {}

    def get(self, key: Any, compiled: Callable[[], Any]) -> Any:
        """Return the step for `key`, or what `compiled` returns, from now on.

        Args:
            key: What the step depends on.
            compiled: Called where there is no such step.
        """
        step = self._steps.pop(key, None) or compiled()
        self._steps[key] = step
        if len(self._steps) > _KEPT_STEPS:
            del self._steps[next(iter(self._steps))]
        return step


class _Itself:
    """Stands for an object that may not be hashable: equal if it is the same one."""

    def __init__(self, value: Any) -> None:
        self._value = value  # and keeps it, so that no other one gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def kept_by_a_trace(optimizer: Any) -> tuple[Any, ...]:
    """Return the settings that a compiled step would keep for ever, to know when it is out of date.

    A new object in place of the old one is noticed. What is changed inside of a dict, an array, a
    schedule or an object of the user's own is not, nor what a function reads that is called while a
    step is traced.

    Args:
        optimizer: The inner optimizer.

    Returns:
        All attributes: numbers, names and lists of them by value, anything else by identity.
    """
    kept: list[Any] = []
    for inside in optimizer_chain(optimizer):
        for name, value in vars(inside).items():
            if isinstance(value, _PLAIN):
                kept.append((name, value))
            elif isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value):
                kept.append((name, *value))
            else:
                kept.append((name, _Itself(value)))
    return tuple(kept)


def rates_now(functions: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Return what each function gives as learning rate at this step.

    Args:
        functions: What `learning_rate_functions` returned.
    """
    rates = [function() for _, function in functions]
    return [rate.value if isinstance(rate, keras.Variable) else rate for rate in rates]


def with_rates(optimizer: Any, rates: Sequence[Any]) -> Any:
    """Return an optimizer with the same variables whose functions of the rate return `rates`.

    A compiled step is given them, and so serves every rate. The optimizer itself is left as it is.

    Args:
        optimizer: The inner optimizer.
        rates: One for each of its `learning_rate_functions`; without any it is returned itself.
    """
    if not rates:
        return optimizer
    pairs = zip(learning_rate_functions(optimizer), rates, strict=True)
    return standing_in(
        optimizer,
        {id(o): {"_learning_rate": functools.partial(_returned, r)} for (o, _), r in pairs},
    )


def _returned(value: Any) -> Any:
    return value
