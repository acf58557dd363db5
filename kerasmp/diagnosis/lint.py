"""Looks over a model before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.keras_graph import called_parts, dtypes_of_graphs, graph_of, has_call
from kerasmp.backend.keras_internals import flatten_layers, unfiltered_tracebacks
from kerasmp.backend.side_effects import preserve_layers, preserve_losses
from kerasmp.conversion.trial import call_attempts, culprits, is_all_stock, trace_call
from kerasmp.diagnosis import data, dtypes, outputs, sizes, source, traced, training
from kerasmp.diagnosis.finding import Finding, LintReport, sorted_report
from kerasmp.errors import ArgumentError, check_model, first_line
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Callable

CANNOT_COMPUTE = "cannot-compute"


def lint(model: Any, x: Any = None) -> LintReport:
    """Say what to mend in a model before its first float16 step.

    Nothing is changed and no step is run. Without `x` the model is only looked at. With `x` the
    range of the data is checked too, and on TensorFlow and JAX the model is traced, to find
    constants that are infinite in float16. A model that is not built is first called with `x`. Of a
    model without a `call`, such as a GAN, the parts are looked at, and `x` is not used.

    Args:
        model: A Keras model, stock or ours; compiled, if its loss and optimizer are to be checked.
        x: A batch of input, as for `model.predict_on_batch`; default None.

    Returns:
        The findings, the worst first. Printed, it has one line for each. Their rules are described
        in docs/lint.md.

    Raises:
        ArgumentTypeError: If `model` is no Keras model.
        ArgumentError: If `x` is no batch.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(8, activation="softmax", dtype="mixed_float16")]
    ... )
    >>> report = lint(model)
    >>> [(each.severity, each.rule) for each in report]
    [('error', 'float16-head')]
    """
    check_model(model, "be checked", fix="Pass the model first, then a batch of its inputs.")
    if not has_call(model):
        x = None  # what its train step does with it, nobody can tell
    if x is not None:
        given, x = x, keras.tree.map_structure(np.asarray, x)
        arrays = _in_order(model, x)
        if not arrays or not all(array.ndim for array in arrays):
            raise ArgumentError(
                "`x` is no batch.",
                received=f"{given!r:.100} of type {type(given).__name__}",
                expected="arrays whose first axis is the batch",
                fix="Pass what model.predict_on_batch takes.",
            )
        _refuse_other_inputs(model, arrays)
    with preserve_losses(model):
        return sorted_report(_told_once(_findings(model, x)))


def _in_order(model: Any, x: Any) -> list[Any]:
    """Return the arrays of a batch in the order of the inputs that a model has."""
    graph = graph_of(model)
    if isinstance(x, dict) and graph is not None and not isinstance(graph.input, dict):
        names = [tensor.name for tensor in graph.inputs]
        if x.keys() >= set(names):  # Keras goes by the names, too, and leaves the rest
            x = [x[name] for name in names]
    return list(keras.tree.flatten(x))


def _refuse_other_inputs(model: Any, arrays: list[Any]) -> None:
    """Raise where a batch cannot be one for the inputs that a model has."""
    graph = graph_of(model)
    wanted = [tuple(tensor.shape) for tensor in graph.inputs] if graph is not None else None
    found = [array.shape for array in arrays]
    fits = wanted is None or (
        len(wanted) == len(found)
        and all(
            len(one) != len(other)  # for which Keras may have or drop an axis
            or all(a in {None, b} for a, b in zip(one, other, strict=True))
            for one, other in zip(wanted, found, strict=True)
        )
    )
    if not fits or any(array.dtype.kind == "c" for array in arrays):
        raise ArgumentError(
            "`x` is no batch for this model.",
            received=", ".join(f"{array.dtype} of shape {array.shape}" for array in arrays),
            expected="real numbers" if fits else f"arrays of the shapes {wanted}",
            fix="Pass what model.predict_on_batch takes.",
        )


def _told_once(found: list[Finding]) -> list[Finding]:
    """Leave out what is told of a layer anew: another way to call it has other words for it."""
    first = {each.place: each for each in reversed(found) if each.rule == CANNOT_COMPUTE}
    return [x for x in found if x.rule != CANNOT_COMPUTE or x is first[x.place]]


def _findings(model: Any, x: Any) -> list[Finding]:
    if x is not None and not model.built:
        _, failed = _tried(model, lambda: model(x))
        if failed:
            return [*cheap_findings(model), *failed]
    # Not before: building makes tensors that have to stay.
    with preserve_layers(model):
        return _findings_of_built(model, x)


def _findings_of_built(model: Any, x: Any) -> list[Finding]:
    found = [*cheap_findings(model), *training.unscaled(model), *sizes.findings(model)]
    if x is None:
        return found
    in_data, failed = _tried(model, lambda: list(data.findings(model, _in_order(model, x))))
    found += [*(in_data or []), *failed]
    constants, failed = _tried(model, lambda: traced.findings(model, x))
    found += [*(constants or []), *failed]
    if not failed and graph_of(model) is None and _asks_for_kernels(model):
        _, failed = _tried(
            model,
            lambda: [each(training=False, backwards=False) for each in call_attempts(model, x)],
        )
        found += failed
    if constants is None:
        return found
    # The graph has told for certain.
    return [each for each in found if each.rule != source.POSSIBLY_INFINITE]


def cheap_findings(model: Any) -> list[Finding]:
    """Return what a look at the layers tells, without data, and without hints about speed.

    Args:
        model: A Keras model.
    """
    symbolic, failed = _tried(model, lambda: dtypes_of_graphs(model))
    if not failed and _asks_for_kernels(model):
        _, failed = _tried(model, lambda: dtypes_of_graphs(model, _ask_for_kernels))
    if symbolic is None:
        return [*failed, *dtypes.findings(model, {}), *source.findings(model)]
    return [
        *failed,
        *(each for part in called_parts(model) for each in outputs.findings(part, symbolic)),
        *dtypes.findings(model, symbolic),
        *source.findings(model),
    ]


def _asks_for_kernels(layer: Any) -> bool:
    """Return whether something in a layer computes in half precision that is not stock."""
    return not is_all_stock(layer) and any(x.compute_dtype in HALVES for x in flatten_layers(layer))


def _ask_for_kernels(operation: Any, args: Any, kwargs: Any) -> None:
    """Raise where a layer of a graph calls an operation that has no kernel."""
    if isinstance(operation, keras.Layer) and _asks_for_kernels(operation):
        trace_call(operation, args, kwargs, training=False, backwards=False)


def _tried(model: Any, action: Callable[[], Any]) -> tuple[Any, list[Finding]]:
    """Return what an action that calls layers returns, or None and what it raised, as a finding."""
    try:
        with unfiltered_tracebacks():
            return action(), []
    except Exception as error:  # noqa: BLE001 - whatever a layer raises
        layers = culprits(error, model)
        place = (layers[0].path or layers[0].name) if layers else model.name
        return None, [
            Finding(
                "error",
                place,
                CANNOT_COMPUTE,
                f"Calling it raises {first_line(error)}.",
                'If float32 would do, give it dtype="float32", or let kerasmp.convert(model) find '
                "what has to stay in it.",
            )
        ]
