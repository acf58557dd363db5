"""Finds constants in the source of user-defined layers that float16 cannot hold."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

from kerasmp.backend.constants import LARGEST
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.diagnosis.dtypes import is_custom, vanishes
from kerasmp.diagnosis.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

POSSIBLY_INFINITE = "possibly-infinite"
POSSIBLY_VANISHING = "possibly-vanishing"

# Methods that do not compute outputs.
_SKIPPED_METHODS = {"__init__", "build", "get_config", "from_config", "compute_output_shape"}
# Code that names one of these already takes care of dtypes.
_WIDE_DTYPES = ("float32", "float64")


def findings(model: Any) -> Iterator[Finding]:
    """Yield the constants in user-defined float16 layers that may become infinite or 0.

    Args:
        model: A Keras model.
    """
    for layer in flatten_layers(model):
        if not is_custom(layer) or layer.compute_dtype != "float16":
            continue
        cls: Any = type(layer)
        for name, number in _numbers(cls):
            place = layer.path or layer.name
            if abs(number) > LARGEST:
                yield Finding(
                    "warning",
                    place,
                    POSSIBLY_INFINITE,
                    f"Possible: `{name}` has the constant {number:g}, which is infinite in "
                    "float16.",
                    "Use one below 65504, or compute this part in float32.",
                )
            elif vanishes(number):
                yield Finding(
                    "warning",
                    place,
                    POSSIBLY_VANISHING,
                    f"Possible: `{name}` has the constant {number:g}, which is 0 in float16.",
                    "Use 1e-6 or more, or compute this part in float32.",
                )


@functools.cache
def _numbers(cls: Any) -> list[tuple[str, float]]:
    """Return the float constants in the methods of a class, each after the method's name."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # defined in a prompt, or by generated code
        return []
    found = []
    for method in ast.walk(ast.parse(source)):
        if not isinstance(method, ast.FunctionDef) or method.name in _SKIPPED_METHODS:
            continue
        text = ast.get_source_segment(source, method) or ""
        if any(dtype in text for dtype in _WIDE_DTYPES):
            continue
        found += [
            (method.name, float(node.value))
            for node in ast.walk(method)
            if isinstance(node, ast.Constant) and isinstance(node.value, float)
        ]
    return found
