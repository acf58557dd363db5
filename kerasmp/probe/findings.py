"""Puts into words what the probe saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend import probe_scope
from kerasmp.backend.keras_graph import called_parts, graph_of, has_call
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.backend.side_effects import preserve_layers
from kerasmp.errors import first_line
from kerasmp.policy.spec import HALVES
from kerasmp.probe.compare import EPSILON, LARGEST
from kerasmp.probe.finding import Finding, Severity
from kerasmp.probe.walk import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kerasmp.probe.values import Trouble

CANNOT_COMPUTE = "cannot-compute"
_REMEDIES = 2  # the most that a finding names
NO_REMEDY = "No remedy that was tried on this batch fixes it."
# What the run in float32 shows, which rounds nothing on the way.
_UNMENDED = {"ids": "Keep ids as integers or float32, from the input on."}


def probe_findings(model: Any, x: Any, state: Sequence[tuple[Any, Any]] = ()) -> list[Finding]:
    """Run a model forward on a batch, under its policy and in float32, and say where they differ.

    The model does not change. If it has no `call`, each of its parts whose inputs fit the batch
    runs.

    Args:
        model: A built model.
        x: A batch of its inputs.
        state: Pairs of variables and values, if the variables do not hold their values.

    Raises:
        Exception: What the model raises in float32.
    """
    if not any(layer.compute_dtype in HALVES for layer in flatten_layers(model)):
        return []
    parts = [model] if has_call(model) else [p for p in called_parts(model) if _fits(p, x)]
    found = []
    for part in parts:
        with preserve_layers(part), probe_scope():
            found += [finding(trouble) for trouble in probe(part, x, state)]
    return found


def _fits(part: Any, x: Any) -> bool:
    """Return whether a part of a model without a `call` takes a batch."""
    graph, arrays = graph_of(part), keras.tree.flatten(x)
    return (
        graph is not None
        and len(graph.inputs) == len(arrays)
        and all(
            len(symbol.shape) == len(array.shape)
            and all(a in {None, b} for a, b in zip(symbol.shape, array.shape, strict=True))
            for symbol, array in zip(graph.inputs, arrays, strict=True)
        )
    )


def finding(trouble: Trouble) -> Finding:
    """Put a trouble into words."""
    kind = trouble.kind
    if isinstance(trouble.operation, keras.layers.Embedding) and kind in {"error", "sensitive"}:
        kind = "ids"
    severity, rule, words = _WORDS[kind]
    reason = words(trouble)
    if trouble.until is not None and trouble.kind != "range":
        reason += f' It shows in "{trouble.until}".'
    remedy = " Or: ".join(trouble.remedies[:_REMEDIES]) or _UNMENDED.get(kind, NO_REMEDY)
    return Finding(severity, trouble.place, rule, reason, remedy)


def count(number: int, size: int) -> str:
    """Return the number of values as a part of all."""
    return f"{number} of {size} values" if size > 1 else "its only value"


def _nonfinite(trouble: Trouble) -> str:
    numbers = trouble.numbers
    half, wide = numbers.worst
    return (
        f"In {trouble.half} it returns {half:g}, in float32 {wide:g} "
        f"({count(numbers.saturated + numbers.nonfinite, numbers.size)})."
    )


def _underflow(trouble: Trouble) -> str:
    numbers = trouble.numbers
    return (
        f"In {trouble.half}, {numbers.flushed} of {numbers.nonzero} values are 0 that are not 0 in "
        "float32."
    )


def _error(trouble: Trouble) -> str:
    numbers, rounding = trouble.numbers, EPSILON[trouble.half]
    half, wide = numbers.worst
    return (
        f"In {trouble.half} it returns {half:g}, in float32 {wide:g}: an error of "
        f"{numbers.error:.2g}, where rounding explains about {rounding:.2g}."
    )


def _sensitive(trouble: Trouble) -> str:
    numbers = trouble.numbers
    half, wide = numbers.worst
    # A layer in float32 is given what half precision has rounded.
    rounded = trouble.half if trouble.half in HALVES else "half precision"
    return (
        f"With inputs rounded to {rounded} it returns {half:g}, in float32 {wide:g}: it "
        f"amplifies their rounding errors ({numbers.error:.2g})."
    )


def _ids(trouble: Trouble) -> str:
    half, wide = trouble.numbers.worst
    return (
        f"Its ids are rounded to {trouble.half} and become other ids: it returns {half:g} from "
        f"another row, in float32 {wide:g}."
    )


def _choice(trouble: Trouble) -> str:
    numbers = trouble.numbers
    return (
        f"Its integers or bools differ from those in float32: {numbers.differing} of "
        f"{numbers.size} ({numbers.differing / numbers.size:.2g})."
    )


def _mask(trouble: Trouble) -> str:
    numbers = trouble.numbers
    return (
        f"Its mask differs from that in float32, in {numbers.differing} of {numbers.size} steps, "
        f"because {trouble.half} rounds its inputs."
    )


def _fails(trouble: Trouble) -> str:
    return f"In {trouble.half} it raises {first_line(trouble.numbers)}. In float32 it runs."


def _range(trouble: Trouble) -> str:
    return (
        f"Values up to {trouble.numbers:g} reach a {trouble.half} layer. Above "
        f"{LARGEST[trouble.half]:g} they become inf."
    )


def _merged(trouble: Trouble) -> str:
    merge = trouble.numbers
    where = "" if merge.column is None else f" in column {merge.column}"
    one, other = merge.example
    return (
        f"Of {merge.before} distinct values{where}, {trouble.half} leaves {merge.after}: "
        f"{one:.8g} and {other:.8g} merge, for example."
    )


_WORDS: dict[str, tuple[Severity, str, Callable[[Trouble], str]]] = {
    "overflow": ("error", "not-finite", _nonfinite),
    "broken": ("error", "not-finite", _nonfinite),
    "underflow": ("warning", "underflow", _underflow),
    "error": ("warning", "inaccurate", _error),
    "sensitive": ("warning", "inaccurate", _sensitive),
    "ids": ("error", "float-ids", _ids),
    "choice": ("warning", "other-choice", _choice),
    "mask": ("error", "other-mask", _mask),
    "fails": ("error", CANNOT_COMPUTE, _fails),
    "range": ("error", "input-range", _range),
    "merged": ("warning", "merged-values", _merged),
}
