"""Finds constants in the traced graph that are infinite in float16."""

from __future__ import annotations

import re
from typing import Any

from kerasmp.backend.constants import infinite_constants
from kerasmp.backend.keras_internals import flatten_layers, float16_layers
from kerasmp.diagnosis.finding import Finding

INFINITE = "infinite-constant"


def findings(model: Any, x: Any) -> list[Finding] | None:
    """Return the infinite constants that a model computes with, or None if it has no graph.

    Args:
        model: A built Keras model.
        x: A batch of NumPy arrays.
    """
    constants = infinite_constants(model, x) if float16_layers(model) else []
    if constants is None:
        return None
    paths = {layer.name: layer.path or layer.name for layer in flatten_layers(model)}
    return [
        Finding(
            "warning" if each.chosen else "error",
            _place(each.scope, paths) or model.name,
            INFINITE,
            f"It selects {each.value:g}, which is infinite in float16: a row of nothing else "
            "becomes NaN in a softmax."
            if each.chosen
            else f"It computes with {each.value:g}, which is infinite in float16, and 0 * inf is "
            "NaN.",
            "Use a mask value such as -3e4, or compute this part in float32.",
        )
        for each in constants
    ]


def _place(scope: str, paths: dict[str, str]) -> str:
    """Return the path of the innermost layer in a name scope."""
    for part in reversed(scope.split("/")):
        for name in (part, re.sub(r"_\d+$", "", part)):
            if name in paths:
                return paths[name]
    return scope
