"""Checks a model before its first training step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import called_parts, dtypes_of_graphs, has_call
from kerasmp.backend.keras_internals import (
    flatten_layers,
    preserve_global_seed,
    unfiltered_tracebacks,
)
from kerasmp.backend.side_effects import preserve_layers, preserve_losses
from kerasmp.conversion.trial import culprits, is_all_stock, trace_call
from kerasmp.diagnosis import dtypes, outputs, sizes, training
from kerasmp.errors import check_model, first_line
from kerasmp.policy.locations import paths
from kerasmp.policy.spec import HALVES
from kerasmp.probe.batch import check_batch, data_findings
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
        found += [*sizes.batch_size(model, keras.tree.flatten(x)), *data_findings(x=x)]
        seen, failed = _try(model, lambda: probe_findings(model, x))
        return found + failed if seen is None else [*not_shown(found, seen), *seen, *failed]


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

    The class of a layer alone, whose values show nothing, is worth a hint.

    Args:
        findings: Findings that need no data.
        seen: What values show.
    """
    shown = {each.place for each in seen if each.severity != "hint"}
    return [
        dataclasses.replace(x, severity="hint") if x.rule == "unsafe-layer" else x
        for x in findings
        if x.place not in shown or x.rule not in _ALSO_SHOWN
    ]


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
        path_of = {id(layer): path for layer, path in paths(model)}
        place = path_of[id(layers[0])] if layers else model.name
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
