"""Steps of a model, which are calls of layers and operations, and how one runs by itself."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend import current
from kerasmp.backend.keras_graph import children, policy_of
from kerasmp.backend.keras_internals import (
    AutocastScope,
    attach_logits,
    autocasts,
    copy_mask,
    flatten_layers,
    logits_of,
    non_trainable_state,
    own_variables,
)
from kerasmp.backend.layer_calls import takes_training, watch_calls
from kerasmp.policy.apply import set_policies, take_back
from kerasmp.policy.spec import HALVES
from kerasmp.probe.arrays import is_float, widen
from kerasmp.probe.values import Value, side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kerasmp.backend.layer_calls import Watcher
    from kerasmp.policy.apply import Undo
    from kerasmp.probe.tape import Step

_STOCK = {"keras", __name__.partition(".")[0]}
_SEED = "seed_generator_state"  # what Keras calls the state of a seed generator


class Runner:
    """Runs steps without side effects on variables.

    Args:
        model: The model that they belong to.
        seed: The state of the global seed generator.
        state: Pairs of variables and values, if the variables do not hold their values.
        training: Whether layers run as in training, except for those that draw random numbers,
            whose results cannot be compared. Otherwise they run as in inference.
    """

    def __init__(
        self, model: Any, seed: Any, state: Sequence[tuple[Any, Any]], *, training: bool = False
    ) -> None:
        known = {id(variable) for variable, _ in state}
        # Keras reads regularized variables in a scope only from its mapping.
        regularized = [v for v in model.trainable_variables if v.regularizer is not None]
        self._state = [*state, *((v, v.value) for v in regularized if id(v) not in known)]
        self.training = training
        self._value_of = {id(variable): value for variable, value in state}
        self._seeds = [seed, *(v for v in non_trainable_state(model) if v.name == _SEED)]
        self.losses: list[Any] = []
        """What layers added by `add_loss` in the last run."""
        self.dtype: str | None = None
        """The dtype in which operations read variables: that of the layer whose code calls them."""

    def half(
        self,
        operation: Any,
        args: Any,
        kwargs: Any,
        watcher: Watcher | None = None,
        state: Sequence[tuple[Any, Any]] = (),
    ) -> tuple[Any, bool]:
        """Run a step under its policy.

        Args:
            operation: The layer or operation.
            args: Its positional arguments, values in any structure.
            kwargs: Its keyword arguments, likewise.
            watcher: What watches the layers that it calls, or None.
            state: Pairs of variables and values that they have in this call.

        Returns:
            The outputs, and whether the step has drawn random numbers.
        """
        args, kwargs = side((args, kwargs), "half")
        return self._run(operation, args, kwargs, state, watcher=watcher)

    def wide(
        self,
        operation: Any,
        args: Any,
        kwargs: Any,
        inputs: str = "wide",
        state: Sequence[tuple[Any, Any]] = (),
    ) -> Any:
        """Run a step in float32; see `half` for the arguments, and `side` for `inputs`."""
        args, kwargs = side((args, kwargs), inputs)
        if cast_dtype(operation) is not None:
            return keras.ops.cast(keras.tree.flatten(args)[0], "float32")
        with in_float32(operation):
            return self._run(operation, args, kwargs, state, dtype="float32")[0]

    def again(self, operation: Any, args: Any, kwargs: Any, *, every: bool = False) -> Any:
        """Run a step in float32 on inputs and weights as half precision rounds them.

        Args:
            operation: The layer or operation.
            args: Its positional arguments, values in any structure.
            kwargs: Its keyword arguments, likewise.
            every: Whether to round weights, too, that Keras does not cast.
        """
        args, kwargs = self.rounded(operation, args, kwargs)
        state = self.rounded_weights(operation, every=every)
        return self.wide(operation, args, kwargs, state=state)

    def call_in_float32(
        self, model: Any, call: Callable[[], Any], state: Sequence[tuple[Any, Any]]
    ) -> Any:
        """Return what a function that calls a model returns, in float32.

        Args:
            model: The model.
            call: The function.
            state: Pairs of variables and values that they have in this call.
        """
        scope = keras.StatelessScope(state_mapping=[*self._state, *state])
        with in_float32(model), scope, AutocastScope("float32"):
            return call()

    def rounded(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Return arguments whose tensors in float32 are as half precision rounds them."""
        half = rounds_to(operation)
        # A layer casts only floats.
        is_cast = is_float if isinstance(operation, keras.Layer) else keras.ops.is_tensor

        def rounded(each: Any) -> Any:
            if isinstance(each, Value):
                return dataclasses.replace(each, wide=rounded(each.half))
            if half is not None and is_cast(each):
                each = copy_mask(each, keras.ops.cast(each, half))
            return widen(each)

        return keras.tree.map_structure(rounded, (args, kwargs))

    def rounded_weights(self, operation: Any, *, every: bool = False) -> list[tuple[Any, Any]]:
        """Return the weights of a step as half precision rounds them; see `again` for `every`."""
        return [
            (v, keras.ops.cast(keras.ops.cast(self._now(v), layer.compute_dtype), v.dtype))
            for layer in halves(operation)
            for v in own_variables(layer)
            if (every or autocasts(v)) and keras.backend.is_float_dtype(v.dtype)
        ]

    def gradients(  # noqa: PLR0913 - a step, by what it is differentiated, and how
        self,
        step: Step,
        inputs: Sequence[Value],
        given: Sequence[Any],
        run: str,
        of_losses: float,
        *,
        ends: Sequence[tuple[int, bool]],
        rounded: bool = False,
    ) -> tuple[list[Any], set[int]]:
        """Return the gradients of a step for its inputs, and then for its weights, or None's.

        Those that a loss has by the logits of probabilities take the place of those by the
        probabilities. Their indices are the second result.

        Args:
            step: The step.
            inputs: The values among its arguments to differentiate by.
            given: A gradient for each of `ends`.
            run: "half" for a run under its policy, or "wide" for one in float32.
            of_losses: The gradient of the losses that layers add.
            ends: Which of its float outputs the gradients belong to, and whether to the logits of
                that output.
            rounded: Whether to run it on inputs and weights as half precision rounds them.
        """
        operation, weights, structure = step.operation, step.weights, (step.args, step.kwargs)
        leaves = keras.tree.flatten(structure)
        places = [[i for i, leaf in enumerate(leaves) if leaf is value] for value in inputs]
        state = {id(v): (v, self._now(v)) for v in weights}
        if rounded:
            leaves = keras.tree.flatten(self.rounded(operation, *structure))
            state |= {id(v): (v, value) for v, value in self.rounded_weights(operation)}
        tensors = [getattr(leaves[first], run) for first, *_ in places]
        tensors += [state[id(v)][1] for v in weights]
        own = len(tensors)
        logits = {
            i: logits_of(tensors[i])
            for i, (first, *_) in enumerate(places)
            if current().DIFFERENTIATES_BY_LOGITS
            and all(map(_counts_by_logits, (leaves[first].half, leaves[first].wide)))
        }

        def call(*each: Any) -> list[Any]:
            placed = list(leaves)
            for i, leaf in zip(logits, each[own:], strict=True):
                attach_logits(each[i], leaf)
            for tensor, where, old in zip(each, places, tensors, strict=False):
                for i in where:
                    copy_mask(old, tensor)
                    placed[i] = dataclasses.replace(leaves[i], half=tensor, wide=tensor)
            args, kwargs = keras.tree.pack_sequence_as(structure, placed)
            pairs = [*state.values(), *zip(weights, each[len(places) : own], strict=True)]
            outputs = (
                self.half(operation, args, kwargs, state=pairs)[0]
                if run == "half"
                else self.wide(operation, args, kwargs, state=pairs)
            )
            floats = list(filter(is_float, keras.tree.flatten(outputs)))
            chosen = [logits_of(floats[i]) if flag else floats[i] for i, flag in ends]
            return [*chosen, *self.losses]

        outer, self.dtype = self.dtype, step.reads
        try:
            outputs, product = current().vjp(call, [*tensors, *logits.values()])
        finally:
            self.dtype = outer
        rest = [keras.ops.full_like(each, of_losses) for each in outputs[len(given) :]]
        pairs = zip(outputs, [*given, *rest], strict=True)
        found = product([keras.ops.cast(each, output.dtype) for output, each in pairs])
        for i, gradient in zip(logits, found[own:], strict=True):
            found[i] = found[i] if gradient is None else gradient
        of_logits = {i for i, each in zip(logits, found[own:], strict=True) if each is not None}
        return found[:own], of_logits

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
            kwargs = {**kwargs, "training": self._in_training(operation, kwargs)}
        with (
            keras.StatelessScope(
                state_mapping=[*self._state, *state], collect_losses=True
            ) as scope,
            AutocastScope(dtype or self.dtype),
            watch_calls(watcher) if watcher is not None else contextlib.nullcontext(),
        ):
            outputs = operation(*args, **kwargs)
        self.losses = list(scope.losses)
        given = self._value_of.get
        drawn = any(scope.get_current_value(s) is not given(id(s)) for s in self._seeds)
        return outputs, drawn

    def _in_training(self, layer: Any, kwargs: dict[str, Any]) -> bool:
        """Return the argument `training` for a layer that is called with these arguments."""
        asked = kwargs.get("training")
        if self.training:
            return asked is not False and not draws(layer)
        return bool(asked) or self._is_untrained(layer)

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


def _counts_by_logits(tensor: Any) -> bool:
    """Return whether a loss uses the logits of a tensor, which a cast to float32 drops."""
    is_float32 = keras.backend.standardize_dtype(tensor.dtype) == "float32"
    return is_float32 and logits_of(tensor) is not None


@contextlib.contextmanager
def in_float32(operation: Any) -> Iterator[None]:
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


def draws(layer: Any) -> bool:
    """Return whether a layer, or one inside it, has a seed generator."""
    return any(variable.name == _SEED for variable in layer.non_trainable_variables)


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
