"""Optimizers inside of optimizers, which Keras has no common way to reach."""

from __future__ import annotations

from typing import Any

import keras


def optimizers_in(optimizer: Any) -> list[Any]:
    """Return the optimizer and all that it holds, at any depth, each once.

    Those of a `MultiOptimizer` are among them, and those that a user's own optimizer keeps in an
    attribute, a list or a dict: how it names them is its own affair.
    """
    found, waiting, seen = [], [optimizer], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, keras.optimizers.Optimizer):
            found.append(each)
            waiting.extend(vars(each).values())
        elif isinstance(each, dict):
            waiting.extend(each.values())
        elif isinstance(each, (list, tuple)):
            waiting.extend(each)
    return found
