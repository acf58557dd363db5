"""Checks a model before its first training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.keras_graph import called_parts, dtypes_of_graphs, graph_of, has_call
from kerasmp.backend.keras_internals import (
    flatten_layers,
    preserve_global_seed,
    unfiltered_tracebacks,
)
from kerasmp.backend.side_effects import preserve_layers, preserve_losses
from kerasmp.conversion.trial import culprits, is_all_stock, trace_call
from kerasmp.diagnosis import dtypes, outputs, sizes, training
from kerasmp.errors import ArgumentError, check_model, first_line, with_type
from kerasmp.policy.spec import HALVES
from kerasmp.probe.finding import Finding, LintReport, sorted_report
from kerasmp.probe.findings import CANNOT_COMPUTE, probe_findings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


# Rules that guess what the probe sees if it happens.
_ALSO_SHOWN = ("float-ids", "mask-value", "unsafe-layer", "vanishing-epsilon")


def lint(model: Any, x: Any = None) -> LintReport:
    """Find what to fix in a model before its first step in half precision.

    With `x`, it also runs the model forward twice, in float32 and under its policy, and compares
    what each layer and operation returns. It takes the time of two to four predictions, run
    eagerly. Weights, seeds, metrics and compiled functions stay as they are. A model that is not
    built yet is first called with `x`. If a model has no `call`, like a GAN, its parts are checked,
    with the batch only those whose inputs it fits.

    Args:
        model: A Keras or kerasmp model. Compile it first to check its loss and optimizer too.
        x: A batch of inputs, as for `model.predict_on_batch`; default None.

    Returns:
        The findings, the worst first. If you print them, each kind takes one line. docs/lint.md
        describes their rules.

    Raises:
        ArgumentTypeError: If `model` is not a Keras model.
        ArgumentError: If `x` is not a batch, or does not fit the model's inputs.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(8, activation="softmax", dtype="mixed_float16")]
    ... )
    >>> report = lint(model)
    >>> [(each.severity, each.rule) for each in report]
    [('error', 'float16-head')]
    """
    check_model(model, "be checked", fix="Pass the model first, then a batch of its inputs.")
    if x is not None:
        x = check_batch(model, x)
    with preserve_losses(model):
        return sorted_report(_first_failures(_findings(model, x)))


def check_batch(model: Any, x: Any) -> Any:
    """Return a batch with arrays in place of tensors and lists.

    Args:
        model: The model.
        x: The batch.

    Raises:
        ArgumentError: If it is not a batch, or does not fit the inputs of the model.
    """
    given, x = x, keras.tree.map_structure(np.asarray, x)
    arrays = _in_order(model, x)
    if not arrays or not all(array.ndim and array.size for array in arrays):
        raise ArgumentError(
            "`x` is not a batch.",
            received=with_type(given),
            expected="arrays with values, whose first axis is the batch",
            fix="Pass the same batch as to model.predict_on_batch.",
        )
    _check_inputs(model, arrays)
    return x


def _in_order(model: Any, x: Any) -> list[Any]:
    """Return the arrays of a batch in the order of the model's inputs."""
    graph = graph_of(model)
    if isinstance(x, dict) and graph is not None and not isinstance(graph.input, dict):
        names = [tensor.name for tensor in graph.inputs]
        if x.keys() >= set(names):  # like Keras, which ignores further names
            x = [x[name] for name in names]
    return list(keras.tree.flatten(x))


def _check_inputs(model: Any, arrays: list[Any]) -> None:
    """Raise an error if a batch does not fit the model's inputs."""
    graph = graph_of(model)
    expected = [tuple(tensor.shape) for tensor in graph.inputs] if graph is not None else None
    received = [array.shape for array in arrays]
    fits = expected is None or (
        len(expected) == len(received)
        and all(
            len(one) != len(other)  # Keras may add or drop an axis
            or all(a in {None, b} for a, b in zip(one, other, strict=True))
            for one, other in zip(expected, received, strict=True)
        )
    )
    if not fits or any(array.dtype.kind == "c" for array in arrays):
        raise ArgumentError(
            "`x` does not fit the inputs of this model.",
            received=", ".join(f"{array.dtype} of shape {array.shape}" for array in arrays),
            expected="real numbers" if fits else f"arrays of the shapes {expected}",
            fix="Pass the same batch as to model.predict_on_batch.",
        )


def _first_failures(findings: list[Finding]) -> list[Finding]:
    """Drop repeated failures of a layer: each way to call it fails with another message."""
    first = {each.place: each for each in reversed(findings) if each.rule == CANNOT_COMPUTE}
    return [x for x in findings if x.rule != CANNOT_COMPUTE or x is first[x.place]]


def _findings(model: Any, x: Any) -> list[Finding]:
    if x is not None and has_call(model) and not model.built:
        _, failed = _try(model, lambda: model(x))
        if failed:
            return [*cheap_findings(model), *failed]
    # Only now, because tensors that a build creates must stay.
    with preserve_layers(model):
        found = [*_unbuilt(model), *cheap_findings(model), *training.unscaled(model)]
        found += sizes.findings(model)
        if x is None:
            return found
        found += sizes.batch_size(model, keras.tree.flatten(x))
        seen, failed = _try(model, lambda: probe_findings(model, x))
        return [*not_shown(found, seen or ()), *(seen or []), *failed]


def _unbuilt(model: Any) -> Iterator[Finding]:
    """Yield a finding for a model, or a part of one without a `call`, whose layers do not exist."""
    for part in called_parts(model):
        if not part.built:
            yield Finding(
                "warning",
                part.path or part.name,
                "unbuilt",
                "It is not built, so its layers cannot be checked.",
                "Pass a batch: kerasmp.lint(model, x)."
                if part is model
                else "Call it on a batch first.",
            )


def static_findings(model: Any) -> list[Finding]:
    """Return the errors and warnings that need no data.

    Args:
        model: A Keras model.
    """
    found = [*cheap_findings(model), *training.unscaled(model)]
    return [each for each in found if each.severity != "hint"]


def not_shown(findings: Iterable[Finding], seen: Iterable[Finding]) -> list[Finding]:
    """Return the findings without those that guess what values have shown.

    Args:
        findings: Findings that need no data.
        seen: What values show.
    """
    shown = {each.place for each in seen if each.severity != "hint"}
    return [x for x in findings if x.place not in shown or x.rule not in _ALSO_SHOWN]


@preserve_global_seed()  # symbolic calls may create the generator, with a seed of Python's
def cheap_findings(model: Any) -> list[Finding]:
    """Return the findings that need no data, without hints about speed.

    Args:
        model: A Keras model.
    """
    symbolic, failed = _try(model, lambda: dtypes_of_graphs(model))
    if not failed and _may_lack_kernels(model):
        _, failed = _try(model, lambda: dtypes_of_graphs(model, _check_kernels))
    if symbolic is None:
        return [*failed, *dtypes.findings(model, {})]
    return [
        *failed,
        *(each for part in called_parts(model) for each in outputs.findings(part, symbolic)),
        *dtypes.findings(model, symbolic),
    ]


def _may_lack_kernels(layer: Any) -> bool:
    """Return whether a layer has user-defined code and computes in half precision."""
    return not is_all_stock(layer) and any(x.compute_dtype in HALVES for x in flatten_layers(layer))


def _check_kernels(operation: Any, args: Any, kwargs: Any) -> None:
    """Raise an error if a layer of a graph calls an operation that has no kernel."""
    if isinstance(operation, keras.Layer) and _may_lack_kernels(operation):
        trace_call(operation, args, kwargs, training=False, backwards=False)


def _try(model: Any, action: Callable[[], Any]) -> tuple[Any, list[Finding]]:
    """Return the result of an action that calls layers, or None and its error as a finding."""
    try:
        with unfiltered_tracebacks():
            return action(), []
    except Exception as error:  # noqa: BLE001 - a layer may raise anything
        layers = culprits(error, model)
        place = (layers[0].path or layers[0].name) if layers else model.name
        return None, [
            Finding(
                "error",
                place,
                CANNOT_COMPUTE,
                f"Calling it raises {first_line(error)}.",
                'If float32 is enough for it, pass dtype="float32", or let kerasmp.convert(model) '
                "find the layers that must stay in float32.",
            )
        ]
