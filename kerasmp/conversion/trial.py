"""Tries layers in half precision, and keeps in float32 those that cannot compute in it.

A user-defined layer may mix in float32 constants, and an operation may have no half-precision
kernel. Only a call can show this, so each layer is traced in the way that the model calls it, which
runs no step and changes no variable. Stock layers are not tried, unless they contain a user's
function.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend import layers_without_kernel, trace
from kerasmp.backend.keras_graph import called_parts, calls, dtypes_of_graphs, graph_of
from kerasmp.backend.keras_internals import (
    AutocastScope,
    flatten_layers,
    layers_in_traceback,
    unfiltered_tracebacks,
)
from kerasmp.backend.side_effects import preserve_layers
from kerasmp.errors import BackendError, PolicyError, first_line
from kerasmp.model import Model
from kerasmp.policy.apply import set_layer_policy, set_policies, take_back
from kerasmp.policy.follow import to_symbolic
from kerasmp.policy.locations import producers_of
from kerasmp.policy.safe import is_kerasmp_layer
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kerasmp.policy.apply import Undo
    from kerasmp.policy.assign import Assignment

    # Traces a call with `training` and with or without gradients.
    Attempt = Callable[..., None]

_WIDE = "float32"
_STOCK = {"keras", __name__.partition(".")[0]}
# Gradients of a call that is not differentiable fail in any dtype: then only the call is tried.
_MODES = {
    "training": (
        {"training": True, "backwards": True},
        {"training": True, "backwards": False},
    ),
    "inference": ({"training": False, "backwards": False},),
}
_UNKNOWN_INPUTS = "its inputs are not known: give convert a sample"


def settle(
    model: Any, rows: Iterable[Assignment], sample: Any = None
) -> tuple[list[Assignment], list[str], dict[int, str]]:
    """Keep layers in float32 that cannot compute in half precision.

    Args:
        model: A model, whose layers follow the policies of `rows` already.
        rows: The assignments.
        sample: A batch of the model's inputs, or None.

    Returns:
        The assignments as they are now, a note for each layer that could not be tried, and the
        dtypes of the tensors in the model's graphs, as `dtypes_of_graphs` returns them.

    Raises:
        PolicyError: If the user wants a layer in half precision that cannot compute in it, or if
            the model cannot be called under its new policies, whatever stays in float32.
    """
    trial = _Trial(rows)
    trial.keep_without_kernels()
    with unfiltered_tracebacks():
        for part in called_parts(model):
            if graph_of(part) is None and trial.is_needed(part):
                trial.settle(part, call_attempts(part, sample if part is model else None))
        try:
            dtypes = dtypes_of_graphs(model, functools.partial(trial.look, model))
            if trial.has_kept:  # a kept layer may have been called before, too
                dtypes = dtypes_of_graphs(model)
        except PolicyError:
            raise
        except Exception as error:
            raise PolicyError(
                "The model cannot be called under its new policies.",
                received=raised(model, error),
                expected="layers that accept the dtypes that the layers before them return",
                fix="Keep this layer and those that feed it in float32 by rules, such as "
                'rules=["safe", {path: "float32"}].',
            ) from error
    return trial.rows, trial.notes, dtypes


class _Trial:
    """The assignments of a conversion, some of which change to float32."""

    def __init__(self, rows: Iterable[Assignment]) -> None:
        self._rows = {id(row.layer): row for row in rows}
        self.notes: list[str] = []
        self.has_kept = False

    @property
    def rows(self) -> list[Assignment]:
        """The assignments as they are now."""
        return list(self._rows.values())

    def is_needed(self, layer: Any) -> bool:
        """Return whether only a call can show that a layer computes in half precision."""
        return bool(self._halves(layer)) and not is_all_stock(layer)

    def keep_without_kernels(self) -> None:
        """Keep stock layers without a half-precision kernel in float32, with the layers in them."""
        for row in self.rows:
            half = _compute_dtype(row)
            fails = half in HALVES and isinstance(row.layer, layers_without_kernel(half))
            if fails and not is_kerasmp_layer(row.layer):
                reason = f"{type(row.layer).__name__} has no {half} kernel on this backend"
                self._keep(self._halves(row.layer), BackendError(reason))

    def look(self, model: Any, operation: Any, args: Any, kwargs: Any) -> None:
        """Try a layer or a user's operation in a model's graph; see `symbolic_dtypes`."""
        if isinstance(operation, keras.Layer):
            if self.is_needed(operation):
                self.settle(operation, [functools.partial(trace_call, operation, args, kwargs)])
        elif not _is_stock(type(operation)):
            attempt = functools.partial(trace, operation, backwards=False)
            error = _error(model, functools.partial(attempt, args, kwargs))
            wide = keras.tree.map_structure(_in_float32, (args, kwargs))
            if error is not None and _error(model, functools.partial(attempt, *wide)) is None:
                self._keep_feeding(model, operation, error)

    def _keep_feeding(self, model: Any, operation: Any, error: Exception) -> None:
        """Keep the layers before an operation in float32, since it has no policy of its own."""
        layers = [
            layer
            for graph in flatten_layers(model)
            for call in calls(graph)
            if call.operation is operation
            for layer in producers_of(graph, call.inputs)
        ]
        rows = [row for layer in layers for row in self._halves(layer)]
        if not rows:
            raise error
        reason = f'"{operation.name}" takes its output, and raised {first_line(error)}'
        self._keep(rows, BackendError(reason))

    def settle(self, layer: Any, attempts: list[Attempt]) -> None:
        """Keep in float32 what fails in half precision and works in float32.

        Args:
            layer: A layer or model.
            attempts: Ways to call it, of which the first that works in float32 counts.
        """
        untried: dict[str, str] = {}
        unbuilt = next((each for each in flatten_layers(layer) if not each.built), None)
        for mode, settings in _MODES.items():
            reason = _UNKNOWN_INPUTS
            if unbuilt is not None and mode == "training" and attempts:
                # This would build a layer that is used in training only, which cannot be undone.
                untried[mode] = f'"{unbuilt.path or unbuilt.name}" in it is not built'
                continue
            for attempt in (functools.partial(a, **each) for a in attempts for each in settings):
                error = _error(layer, attempt)
                if error is None:
                    break
                wide = self._error_in_float32(layer, attempt)
                if wide is None:
                    self._keep_failing(layer, attempt, error)
                    break
                if reason is _UNKNOWN_INPUTS:
                    reason = f"it cannot be traced, not even in float32: {first_line(wide)}"
            else:
                untried[mode] = reason
        if untried:
            in_both = len(untried) == len(_MODES)
            mode, reason = untried.popitem()
            where = "half precision" + ("" if in_both else f" for {mode}")
            note = f'"{layer.path or layer.name}" was not tried in {where}, as {reason}'
            if note not in self.notes:
                self.notes.append(note)

    def _keep_failing(self, layer: Any, attempt: Attempt, error: Exception | None) -> None:
        # Each turn keeps a layer in float32. With all of them in float32 the attempt works.
        while error is not None and self._halves(layer):
            for culprit in (*culprits(error, layer), layer):
                halves = self._halves(culprit)
                if halves:
                    alone = halves[0].layer is culprit
                    self._keep(halves[:1] if alone else halves, error, None if alone else culprit)
                    break
            error = _error(layer, attempt)

    def _halves(self, layer: Any) -> list[Assignment]:
        """Return the rows of a layer and of those in it that change to half precision."""
        rows = [self._rows.get(id(each)) for each in flatten_layers(layer)]
        return [
            row
            for row in rows
            if row is not None and row.before != row.after and _compute_dtype(row) in HALVES
        ]

    def _keep(self, rows: list[Assignment], error: Exception, holder: Any | None = None) -> None:
        for row in rows:
            reason = f"cannot compute in {_compute_dtype(row)}: {first_line(error)}"
            if holder is not None:
                reason = f'in "{self._rows[id(holder)].path}", which {reason}'
            if row.reason.startswith(("your rule", "the text")):
                raise PolicyError(
                    "A layer was assigned half precision, but cannot compute in it.",
                    received=f'"{row.path}", by {row.reason} under "{row.after}": {reason}',
                    expected=f'"{_WIDE}" for it',
                    fix="Change the rule or the text, or let the layer's own code cast to "
                    "self.compute_dtype.",
                ) from error
            self._rows[id(row.layer)] = row._replace(after=_WIDE, reason=reason)
            self.has_kept = True
            set_layer_policy(row.layer, keras.DTypePolicy(_WIDE))

    def _error_in_float32(self, layer: Any, attempt: Attempt) -> Exception | None:
        undo: Undo = []
        try:
            wide = keras.DTypePolicy(_WIDE)
            set_policies([(row.layer, wide) for row in self._halves(layer)], undo)
            return _error(layer, attempt)
        finally:
            take_back(undo)


def is_all_stock(layer: Any) -> bool:
    """Return whether all code of a layer, and of the layers in it, is Keras's or kerasmp's."""
    return all(map(_runs_stock_code, flatten_layers(layer)))


def _runs_stock_code(layer: Any) -> bool:
    if not _is_stock(type(layer)) or isinstance(layer, keras.layers.Lambda):
        return False
    # An attribute such as an activation may be a user's function.
    functions = [value for value in vars(layer).values() if callable(value)]
    return all(_is_stock(each) or _is_stock(type(each)) for each in functions)


def _is_stock(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _STOCK


def call_attempts(model: Any, sample: Any) -> list[Attempt]:
    """Return ways to call a model that has no graph; none if its inputs are not known."""
    # Without what a kerasmp model does around a call, which could change what is being tried.
    call = functools.partial(keras.Model.__call__, model) if isinstance(model, Model) else model
    if sample is not None:
        return [functools.partial(trace_call, call, (to_symbolic(sample),), {})]
    return [functools.partial(trace_call, call, *arguments) for arguments in _arguments(model)]


def _arguments(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield arguments that a model may have been built with, as symbols. Their dtypes are a guess.

    Args:
        model: A built model.
    """
    for dtype in ("float32", "int32"):
        symbol = functools.partial(keras.KerasTensor, dtype=dtype)
        with contextlib.suppress(Exception):  # a user's method may return anything
            config = model.get_build_config() or {}
            shapes = config.get("shapes_dict")
            if shapes:
                symbols = {
                    name.removesuffix("_shape"): keras.tree.map_shape_structure(symbol, shape)
                    for name, shape in shapes.items()
                }
                yield (), symbols
            elif config.get("input_shape") is not None:
                yield (keras.tree.map_shape_structure(symbol, config["input_shape"]),), {}


def trace_call(call: Any, args: Any, kwargs: Any, *, training: bool, backwards: bool) -> None:
    """Trace a call in training or inference mode, as `kerasmp.backend.trace` does."""
    # With a scope around it, a layer reads variables that have another dtype in its own, too.
    with AutocastScope(_WIDE):
        trace(call, args, {"training": training, **kwargs}, backwards=backwards)


def _error(layer: Any, attempt: Attempt) -> Exception | None:
    try:
        with preserve_layers(layer):
            attempt()
    except Exception as error:  # noqa: BLE001 - a user's layer may raise any
        return error
    return None


def _in_float32(value: Any) -> Any:
    is_half = isinstance(value, keras.KerasTensor) and value.dtype in HALVES
    return keras.KerasTensor(value.shape, _WIDE, value.sparse) if is_half else value


def culprits(error: Exception, layer: Any) -> list[Any]:
    """Return the layers in a layer, itself included, that an error comes from, innermost first."""
    inside = flatten_layers(layer)
    found = [each for each in layers_in_traceback(error) if any(each is part for part in inside)]
    names = "/".join(getattr(error, "__notes__", ())).split("/")
    return found or [part for name in reversed(names) for part in inside if part.name == name]


def raised(model: Any, error: Exception) -> str:
    """Return which layer of a model raised an error, and the error, for a message."""
    layers = layers_in_traceback(error)
    path = (layers[0].path or layers[0].name) if layers else model.name
    return f'"{path}", which raised {first_line(error)}'


def _compute_dtype(row: Assignment) -> str:
    return str(row.policy_after.compute_dtype)
