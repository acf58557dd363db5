"""Tries the layers that are to compute in half precision, and keeps in float32 those that cannot.

A user's layer may mix in constants of float32, and an operation may have no kernel in half
precision. Only a call tells, so each is traced, as the model calls it: that costs no step, and
changes no variable. Stock layers are known, but for functions that a user has put into them.
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
    layers_in,
    traces_kept,
    whole_tracebacks,
)
from kerasmp.errors import BackendError, PolicyError, first_line
from kerasmp.model import Model
from kerasmp.policy.apply import set_layer_policy
from kerasmp.policy.follow import to_symbolic
from kerasmp.policy.locations import producers_of
from kerasmp.policy.safe import is_kerasmp_layer
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kerasmp.policy.assign import Assignment

    # Traces a call with `training` and with or without gradients.
    Attempt = Callable[..., None]

_WIDE = "float32"
_STOCK = {"keras", __name__.partition(".")[0]}
# Gradients of what cannot be differentiated fail in any dtype: then the call alone is looked at.
_WAYS = {
    "training": (
        {"training": True, "backwards": True},
        {"training": True, "backwards": False},
    ),
    "inference": ({"training": False, "backwards": False},),
}
_UNKNOWN = "its inputs are not known: give convert a sample"


def settle(
    model: Any, rows: Iterable[Assignment], sample: Any = None
) -> tuple[list[Assignment], list[str], dict[int, str]]:
    """Keep in float32 what cannot compute in half precision.

    Args:
        model: A model, whose layers follow the policies of `rows` already.
        rows: What layers were assigned.
        sample: A batch as the model takes it, or None.

    Returns:
        The rows as they are now; what could not be tried, in words; and what the model's graphs
        are to say of dtypes, as `dtypes_of_graphs` has it.

    Raises:
        PolicyError: If the user wants a layer in half precision that cannot compute in it, or if
            the model cannot be called under its new policies, whatever stays in float32.
    """
    trial = _Trial(rows)
    trial.keep_without_kernels()
    with whole_tracebacks():
        for part in called_parts(model):
            if graph_of(part) is None and trial.asks(part):
                trial.settle(part, attempts_at(part, sample if part is model else None))
        try:
            dtypes = dtypes_of_graphs(model, functools.partial(trial.look, model))
            if trial.kept:  # one of them may have been called before, too
                dtypes = dtypes_of_graphs(model)
        except PolicyError:
            raise
        except Exception as error:
            raise _not_callable(model, error) from error
    return trial.rows, trial.notes, dtypes


class _Trial:
    """The rows of a conversion, of which some come to stay in float32."""

    def __init__(self, rows: Iterable[Assignment]) -> None:
        self._rows = {id(row.layer): row for row in rows}
        self.notes: list[str] = []
        self.kept: list[Any] = []

    @property
    def rows(self) -> list[Assignment]:
        """The rows as they are now."""
        return list(self._rows.values())

    def asks(self, layer: Any) -> bool:
        """Return whether only a call can tell that a layer computes in half precision."""
        return bool(self._halves(layer)) and not is_known(layer)

    def keep_without_kernels(self) -> None:
        """Keep in float32 the stock layers that are known to fail, and what is inside of them."""
        for row in self.rows:
            half = _compute_dtype(row)
            fails = half in HALVES and isinstance(row.layer, layers_without_kernel(half))
            if fails and not is_kerasmp_layer(row.layer):
                reason = f"{type(row.layer).__name__} has no {half} kernel on this backend"
                self._keep(self._halves(row.layer), BackendError(reason))

    def look(self, model: Any, operation: Any, args: Any, kwargs: Any) -> None:
        """Try a layer, or an operation of a user's, of a model's graph; see `symbolic_dtypes`."""
        if isinstance(operation, keras.Layer):
            if self.asks(operation):
                self.settle(operation, [functools.partial(traced, operation, args, kwargs)])
        elif not _is_stock(type(operation)):
            attempt = functools.partial(trace, operation, backwards=False)
            error = _error(model, functools.partial(attempt, args, kwargs))
            wide = keras.tree.map_structure(_in_float32, (args, kwargs))
            if error is not None and _error(model, functools.partial(attempt, *wide)) is None:
                self._keep_what_feeds(model, operation, error)

    def _keep_what_feeds(self, model: Any, operation: Any, error: Exception) -> None:
        """Keep in float32 the layers before an operation, which has no policy of its own."""
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
        what = f'"{operation.name}" takes what it gives, and raised {first_line(error)}'
        self._keep(rows, BackendError(what))

    def settle(self, layer: Any, attempts: list[Attempt]) -> None:
        """Keep in float32 what fails in half precision and not in float32.

        Args:
            layer: A layer or model.
            attempts: Ways to call it, of which the first that works in float32 counts.
        """
        untried: dict[str, str] = {}
        unbuilt = next((each for each in flatten_layers(layer) if not each.built), None)
        for where, ways in _WAYS.items():
            reason = _UNKNOWN
            if unbuilt is not None and where == "training" and attempts:
                # A part that is used in training alone would be built, which nothing takes back.
                untried[where] = f'"{unbuilt.path or unbuilt.name}" in it is not built'
                continue
            for attempt in (functools.partial(each, **way) for each in attempts for way in ways):
                error = _error(layer, attempt)
                if error is None:
                    break
                wide = self._error_in_float32(layer, attempt)
                if wide is None:
                    self._keep_what_fails(layer, attempt, error)
                    break
                if reason is _UNKNOWN:
                    reason = f"it cannot be traced, also in float32: {first_line(wide)}"
            else:
                untried[where] = reason
        for where, reason in list(untried.items())[-1:]:
            both = len(untried) == len(_WAYS)
            self._say_untried(layer, "" if both else f" for {where}", reason)

    def _keep_what_fails(self, layer: Any, attempt: Attempt, error: Exception | None) -> None:
        # Each turn keeps a layer in float32, and with all of them there the attempt works.
        while error is not None and self._halves(layer):
            for culprit in (*culprits(error, layer), layer):
                halves = self._halves(culprit)
                if halves:
                    alone = halves[0].layer is culprit
                    self._keep(halves[:1] if alone else halves, error, None if alone else culprit)
                    break
            error = _error(layer, attempt)

    def _say_untried(self, layer: Any, where: str, reason: str) -> None:
        note = f'"{layer.path or layer.name}" was not tried in half precision{where}, as {reason}'
        if note not in self.notes:
            self.notes.append(note)

    def _halves(self, layer: Any) -> list[Assignment]:
        """Return the rows, of a layer and all inside it, that come to compute in half precision."""
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
                    "A layer that is to compute in half precision cannot.",
                    received=f'"{row.path}", by {row.reason} under "{row.after}": {reason}',
                    expected=f'"{_WIDE}" for it',
                    fix="Change what says so, or let its own code cast to self.compute_dtype.",
                ) from error
            self._rows[id(row.layer)] = row._replace(after=_WIDE, reason=reason)
            self.kept.append(row.layer)
            set_layer_policy(row.layer, keras.DTypePolicy(_WIDE))

    def _error_in_float32(self, layer: Any, attempt: Attempt) -> Exception | None:
        halves = self._halves(layer)
        with contextlib.ExitStack() as back:
            for row in halves:
                back.callback(set_layer_policy, row.layer, row.layer.dtype_policy)
                set_layer_policy(row.layer, keras.DTypePolicy(_WIDE))
            return _error(layer, attempt)


def is_known(layer: Any) -> bool:
    """Return whether all that a layer, or one inside it, computes is stock."""
    return all(map(_is_known, flatten_layers(layer)))


def _is_known(layer: Any) -> bool:
    if not _is_stock(type(layer)) or isinstance(layer, keras.layers.Lambda):
        return False
    # An activation, say: its code may be a user's.
    functions = [value for value in vars(layer).values() if callable(value)]
    return all(_is_stock(each) or _is_stock(type(each)) for each in functions)


def _is_stock(what: Any) -> bool:
    return str(getattr(what, "__module__", "")).partition(".")[0] in _STOCK


def attempts_at(model: Any, sample: Any) -> list[Attempt]:
    """Return the ways to call a model that no graph calls; none where its inputs are not known."""
    # Around what a model of ours does beside: it may not change what is being tried.
    ours = isinstance(model, Model)
    call = functools.partial(keras.Model.__call__, model) if ours else model
    if sample is not None:
        return [functools.partial(traced, call, (to_symbolic(sample),), {})]
    return [functools.partial(traced, call, *arguments) for arguments in _arguments(model)]


def _arguments(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments that a model may have been built with, as symbols: their dtypes are lost.

    Args:
        model: A built model.
    """
    for dtype in ("float32", "int32"):
        symbol = functools.partial(keras.KerasTensor, dtype=dtype)
        with contextlib.suppress(Exception):  # a user's method may say anything
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


def traced(call: Any, args: Any, kwargs: Any, *, training: bool, backwards: bool) -> None:
    """Trace a call, as `kerasmp.backend.trace` does, in training or in inference."""
    # With a scope around it, a layer reads variables that have another dtype in its own, too.
    with AutocastScope(_WIDE):
        trace(call, args, {"training": training, **kwargs}, backwards=backwards)


def _error(layer: Any, attempt: Attempt) -> Exception | None:
    try:
        with traces_kept(layer):
            attempt()
    except Exception as error:  # noqa: BLE001 - whatever a user's layer raises
        return error
    return None


def _in_float32(value: Any) -> Any:
    is_half = isinstance(value, keras.KerasTensor) and value.dtype in HALVES
    return keras.KerasTensor(value.shape, _WIDE, value.sparse) if is_half else value


def culprits(error: Exception, layer: Any) -> list[Any]:
    """Return the layers, of one and those inside it, that an error comes from, innermost first."""
    inside = flatten_layers(layer)
    raised = [each for each in layers_in(error) if any(each is part for part in inside)]
    names = "/".join(getattr(error, "__notes__", ())).split("/")
    return raised or [part for name in reversed(names) for part in inside if part.name == name]


def _compute_dtype(row: Assignment) -> str:
    return str(row.policy_after.compute_dtype)


def _not_callable(model: Any, error: Exception) -> PolicyError:
    where = [layer.path or layer.name for layer in layers_in(error)]
    return PolicyError(
        "The model cannot be called under its new policies.",
        received=f'"{where[0] if where else model.name}", which raised {first_line(error)}',
        expected="layers that take the dtypes that the layers before them give",
        fix='Keep it and what it takes in float32 by rules, such as rules=["safe", {path: '
        '"float32"}].',
    )
