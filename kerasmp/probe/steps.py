"""Steps of a model, which are calls of layers and operations, and how one runs by itself."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.keras_graph import children, policy_of
from kerasmp.backend.keras_internals import (
    AutocastScope,
    autocasts,
    copy_mask,
    flatten_layers,
    non_trainable_state,
    own_variables,
)
from kerasmp.backend.layer_calls import takes_training, watch_calls
from kerasmp.policy.apply import set_policies, take_back
from kerasmp.policy.spec import HALVES
from kerasmp.probe.arrays import is_float, widen
from kerasmp.probe.values import side

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kerasmp.backend.layer_calls import Watcher
    from kerasmp.policy.apply import Undo
    from kerasmp.probe.values import Value

_STOCK = {"keras", __name__.partition(".")[0]}
_SEED = "seed_generator_state"  # what Keras calls the state of a seed generator


class Runner:
    """Runs steps without side effects on variables.

    Args:
        model: The model that they belong to.
        seed: The state of the global seed generator.
        state: Pairs of variables and values, if the variables do not hold their values.
    """

    def __init__(self, model: Any, seed: Any, state: Sequence[tuple[Any, Any]]) -> None:
        self._state = list(state)
        self._value_of = {id(variable): value for variable, value in state}
        self._seeds = [seed, *(v for v in non_trainable_state(model) if v.name == _SEED)]
        self.dtype: str | None = None
        """The dtype in which operations read variables: that of the layer whose code calls them."""

    def half(
        self, operation: Any, args: Any, kwargs: Any, watcher: Watcher | None = None
    ) -> tuple[Any, bool]:
        """Run a step under its policy.

        Args:
            operation: The layer or operation.
            args: Its positional arguments, values in any structure.
            kwargs: Its keyword arguments, likewise.
            watcher: What watches the layers that it calls, or None.

        Returns:
            The outputs, and whether the step has drawn random numbers.
        """
        return self._run(operation, *side((args, kwargs), "half"), watcher=watcher)

    def wide(self, operation: Any, args: Any, kwargs: Any, inputs: str = "wide") -> Any:
        """Run a step in float32; see `half` for the arguments, and `side` for `inputs`."""
        args, kwargs = side((args, kwargs), inputs)
        if cast_dtype(operation) is not None:
            return keras.ops.cast(keras.tree.flatten(args)[0], "float32")
        with _in_float32(operation):
            return self._run(operation, args, kwargs, dtype="float32")[0]

    def again(self, operation: Any, args: Any, kwargs: Any, *, every: bool = False) -> Any:
        """Run a step in float32 on inputs and weights as half precision rounds them.

        Args:
            operation: The layer or operation.
            args: Its positional arguments, values in any structure.
            kwargs: Its keyword arguments, likewise.
            every: Whether to round weights, too, that Keras does not cast.
        """
        half = rounds_to(operation)
        # A layer casts only floats.
        is_cast = is_float if isinstance(operation, keras.Layer) else keras.ops.is_tensor

        def rounded(each: Any) -> Any:
            if half is not None and is_cast(each):
                each = copy_mask(each, keras.ops.cast(each, half))
            return widen(each)

        args, kwargs = keras.tree.map_structure(rounded, side((args, kwargs), "half"))
        if cast_dtype(operation) is not None:
            return keras.tree.flatten(args)[0]
        state = [
            (v, keras.ops.cast(keras.ops.cast(self._now(v), layer.compute_dtype), v.dtype))
            for layer in halves(operation)
            for v in own_variables(layer)
            if (every or autocasts(v)) and keras.backend.is_float_dtype(v.dtype)
        ]
        with _in_float32(operation):
            return self._run(operation, args, kwargs, state, dtype="float32")[0]

    def _run(  # noqa: PLR0913 - two are set by a keyword each
        self,
        operation: Any,
        args: Any,
        kwargs: Any,
        state: Sequence[tuple[Any, Any]] = (),
        *,
        watcher: Watcher | None = None,
        dtype: str | None = None,
    ) -> tuple[Any, bool]:
        if isinstance(operation, keras.Layer) and takes_training(operation):
            training = kwargs.get("training") or self._is_untrained(operation)
            kwargs = {**kwargs, "training": training}
        with (
            keras.StatelessScope(state_mapping=[*self._state, *state]) as scope,
            AutocastScope(dtype or self.dtype),
            watch_calls(watcher) if watcher is not None else contextlib.nullcontext(),
        ):
            outputs = operation(*args, **kwargs)
        given = self._value_of.get
        drawn = any(scope.get_current_value(s) is not given(id(s)) for s in self._seeds)
        return outputs, drawn

    def _is_untrained(self, layer: Any) -> bool:
        """Return whether a BatchNormalization has seen no data.

        It returns its inputs then, in inference. In a deep network these become ever smaller, as
        they never do in training.
        """
        if not isinstance(layer, keras.layers.BatchNormalization):
            return False
        mean, variance = (
            keras.ops.convert_to_numpy(self._now(v))
            for v in (layer.moving_mean, layer.moving_variance)
        )
        return bool(np.all(mean == 0) and np.all(variance == 1))

    def _now(self, variable: Any) -> Any:
        """Return the value of a variable."""
        value = self._value_of.get(id(variable))
        return variable.value if value is None else value


@contextlib.contextmanager
def _in_float32(operation: Any) -> Iterator[None]:
    """Let a layer and the layers in it compute in float32."""
    undo: Undo = []
    try:
        for layer in halves(operation):
            mode = policy_of(layer).quantization_mode
            name = "float32" if mode is None else f"{mode}_from_float32"
            set_policies([(layer, keras.dtype_policies.get(name))], undo)
        yield
    finally:
        take_back(undo)


def is_user_defined(operation: Any) -> bool:
    """Return whether a step is a call of a layer whose class is neither Keras's nor kerasmp's."""
    is_stock = type(operation).__module__.partition(".")[0] in _STOCK
    return isinstance(operation, keras.Layer) and not is_stock


def is_container(operation: Any) -> bool:
    """Return whether user-defined code calls layers inside a layer."""
    return is_user_defined(operation) and bool(children(operation))


def halves(operation: Any) -> list[Any]:
    """Return the layers in a layer, itself included, that compute in half precision."""
    if not isinstance(operation, keras.Layer):
        return []
    return [each for each in flatten_layers(operation) if each.compute_dtype in HALVES]


def has_weights(operation: Any) -> bool:
    """Return whether a step is a call of a layer with weights, other than those of the data."""
    if not isinstance(operation, keras.Layer) or isinstance(operation, keras.layers.Normalization):
        return False
    return bool(operation.weights)


def cast_dtype(operation: Any) -> str | None:
    """Return the half dtype that an operation of a graph casts to, or None."""
    if isinstance(operation, keras.Layer) or type(operation).__name__ != "Cast":
        return None
    return str(operation.dtype) if operation.dtype in HALVES else None


def rounds_to(operation: Any) -> str | None:
    """Return the half dtype that a step casts its inputs to, or None."""
    if not isinstance(operation, keras.Layer):
        return cast_dtype(operation)
    half = str(operation.compute_dtype)
    return half if operation.autocast and half in HALVES else None


def half_dtype(operation: Any, given: Sequence[Value], outputs: Any) -> str:
    """Return the half dtype that a step meets, or float32."""
    tensors = [value.half for value in given] + keras.tree.flatten(outputs)
    found = {keras.backend.standardize_dtype(t.dtype) for t in tensors if hasattr(t, "dtype")}
    found |= {str(layer.compute_dtype) for layer in halves(operation)}
    return next((half for half in ("bfloat16", "float16") if half in found), "float32")
