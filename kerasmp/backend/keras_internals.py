"""Every name that kerasmp takes from Keras's private modules, each with the reason.

`tests/backend/test_keras_private.py` tells when one of them moves. It also watches the private
attributes that kerasmp's subclasses inherit and read on themselves, where no other package could:
`_trainable_variables`, `_variables`, `_get_variable_index` and `_check_variables_are_known` of
`keras.optimizers.Optimizer`, for which there is no public reader.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import traceback
from typing import TYPE_CHECKING, Any

import keras
from keras.optimizers.schedules import LearningRateSchedule
from keras.src.backend import compute_output_spec, get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.variables import AutocastScope
from keras.src.models.functional import Functional
from keras.src.models.model import functional_init_arguments

from kerasmp.backend.nested import optimizer_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "RESULT_OR_LOGS",
    "UPDATE_METRICS",
    "AutocastScope",
    "Functional",
    "autocasts",
    "compute_output_spec",
    "decays",
    "enclosing_callback_list",
    "flatten_layers",
    "float16_layers",
    "functional_init_arguments",
    "values_of",
    "layers_in_traceback",
    "learning_rate_functions",
    "learning_rate_numbers",
    "learning_rate_schedules",
    "preserve_losses",
    "moments",
    "optimizer_in_fit",
    "own_attributes",
    "own_variables",
    "set_autocast",
    "set_keras_mask",
    "non_trainable_state",
    "step_count",
    "preserve_layers",
    "restore_on_error",
    "weights_and_averages",
    "unfiltered_tracebacks",
    "copy_mask",
]

# A subclass that calls super() adds a frame or two; more would be somebody else's call.
_FRAMES = 8

# AutocastScope: with None, variables are read in their own dtype inside a layer's `call`, with a
# dtype in that one; `autocast=False` of a variable does the former only, and for good.
# Functional: the class of `keras.Model(inputs, outputs)` has no public name, and a model of ours
# that is built from inputs and outputs must inherit from it. functional_init_arguments: what
# tells `keras.Model` that it was given inputs and outputs; a copy of it could come to differ.
# set_keras_mask: how stock Masking leaves on its outputs the mask that it found.
# compute_output_spec: traces any function and changes no state; publicly a layer is asked for its
# outputs, and may answer without computing.


def copy_mask(tensor: Any, other: Any) -> Any:
    """Return `other` with the mask that a layer has left on `tensor`.

    Losses and metrics go by it, and `keras.ops.cast` drops it. Publicly there is no way to it.
    """
    mask = get_keras_mask(tensor)
    if mask is not None:
        set_keras_mask(other, mask)
    return other


def flatten_layers(model: Any) -> list[Any]:
    """Return the layer itself and all layers inside it, at any depth.

    Public `layers` shows one level only, and not the parts of wrappers or of attention.
    """
    return list(model._flatten_layers())  # noqa: SLF001 - no public way to reach inner layers


def own_variables(layer: Any) -> list[Any]:
    """Return the variables that a layer holds itself, without those of the layers inside it.

    Public `variables` has both, and those of seed generators, which `add_weight` did not make. The
    states of a stateful RNN layer are among them, which Keras tracks nowhere.
    """
    own = [*layer._trainable_variables, *layer._non_trainable_variables]  # noqa: SLF001 - see above
    states = getattr(layer, "states", None) if isinstance(layer, keras.layers.RNN) else None
    return own + [s for s in keras.tree.flatten(states) if isinstance(s, keras.Variable)]


def autocasts(variable: Any) -> bool:
    """Return whether layers read a variable in their compute dtype; publicly only to be given."""
    return bool(variable._autocast)  # noqa: SLF001 - see above


def set_autocast(variable: Any, *, to: bool) -> None:
    """Let layers read a variable in their compute dtype, or in its own."""
    variable._autocast = to  # noqa: SLF001 - see above


def weights_and_averages(optimizer: Any) -> list[tuple[Any, Any]]:
    """Return the variables of a built optimizer with the averages that `use_ema` keeps of them.

    There is no public way to reach these, nor the variables that they belong to.
    """
    return [
        (variable, average)
        for inside in optimizer_chain(optimizer)
        if inside.use_ema and inside.built
        for variable, average in zip(
            inside._trainable_variables,  # noqa: SLF001
            inside._model_variables_moving_average,  # noqa: SLF001
            strict=True,
        )
        if average is not None
    ]


# On JAX, what Keras's train step updates the metrics by. A guard of ours takes the loss from it,
# which publicly is seen only where it is differentiated.
UPDATE_METRICS = "_update_metrics_variables"
# What makes the logs of an epoch of those of its last step and of the metrics. Publicly there are
# the metrics alone, which say 0 of nothing.
RESULT_OR_LOGS = "_get_metrics_result_or_logs"


def is_built_with(optimizer: Any, variables: Sequence[Any]) -> bool:
    """Return whether variables are those that an optimizer was built with, all and in order.

    Publicly each is looked up by itself.
    """
    own = optimizer._trainable_variables  # noqa: SLF001 - see above
    return len(variables) == len(own) and all(map(operator.is_, variables, own))


def moments(optimizer: Any, variables: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return what a built Adam, AdamW or SGD keeps of each variable: two moments, one or none.

    Publicly there is one list of all that an optimizer keeps.
    """
    both: list[list[Any]] = (
        [optimizer.momentums]
        if isinstance(optimizer, keras.optimizers.SGD)
        else [optimizer._momentums, optimizer._velocities]  # noqa: SLF001
    )
    lists = [each for each in both if each]
    if not lists:
        return [()] * len(variables)
    if not is_built_with(optimizer, variables):
        indices = [optimizer._get_variable_index(v) for v in variables]  # noqa: SLF001
        lists = [[each[index] for index in indices] for each in lists]
    return list(zip(*lists, strict=True))


def values_of(variables: Sequence[Any]) -> list[Any]:
    """Return the tensors of variables.

    Publicly each asks for scopes and the device, which on torch takes as long as a small kernel.
    """
    if in_stateless_scope():
        return [v.value for v in variables]
    return [v._value for v in variables]  # noqa: SLF001 - see above


def optimizer_in_fit(model: Any) -> list[tuple[Any, Any]]:
    """Return the variables of a model's optimizer with what `fit` on JAX keeps outside of them.

    Empty where they hold it themselves. Publicly there is `jax_state_sync`, for all of the model.
    """
    state = getattr(model, "_jax_state", None)
    if not state or model._jax_state_synced:  # noqa: SLF001 - see above
        return []
    return list(zip(model.optimizer.variables, state["optimizer_variables"], strict=True))


def step_count(optimizer: Any) -> int:
    """Return how many steps a built optimizer has applied; public `iterations` are full windows."""
    return int(keras.ops.convert_to_numpy(optimizer._iterations))  # noqa: SLF001


def decays(optimizer: Any, variable: Any) -> bool:
    """Return whether an optimizer's weight decay applies to a variable; it may be left out."""
    return optimizer.weight_decay is not None and bool(optimizer._use_weight_decay(variable))  # noqa: SLF001


def learning_rate_numbers(optimizer: Any) -> list[float]:
    """Return the learning rates that are numbers, of an optimizer and of those inside of it.

    Publicly a schedule would be asked for the one of now. In a trace none can be read.
    """
    found = []
    for inside in optimizer_chain(optimizer):
        rate = inside._learning_rate  # noqa: SLF001 - see above
        if isinstance(rate, keras.Variable):
            with contextlib.suppress(Exception):  # each framework has its own for a trace
                found.append(float(keras.ops.convert_to_numpy(rate)))
    return found


@contextlib.contextmanager
def restore_on_error(optimizers: Sequence[Any]) -> Iterator[None]:
    """Take back all that building optimizers has made, where that fails.

    Publicly an optimizer only gets variables, and none is ever taken from it.
    """
    kept = [
        (each, dict(vars(each)), len(each._variables), dict(each._trainable_variables_indices))  # noqa: SLF001
        for each in optimizers
    ]
    try:
        yield
    except BaseException:  # an interrupt, too
        for each, attributes, number, indices in kept:
            for variable in each._variables[number:]:  # noqa: SLF001
                each._untrack_variable(variable)  # noqa: SLF001
            for name in vars(each).keys() - attributes.keys():
                del vars(each)[name]
            vars(each).update(attributes)
            each._trainable_variables_indices.clear()  # noqa: SLF001
            each._trainable_variables_indices.update(indices)  # noqa: SLF001
        raise


def learning_rate_schedules(optimizer: Any) -> list[tuple[Any, Any]]:
    """Return each optimizer inside, or the optimizer itself, with its learning-rate schedule.

    Those without a schedule are left out. Publicly `learning_rate` gives the present number alone.
    """
    return [
        (inside, inside._learning_rate)  # noqa: SLF001
        for inside in optimizer_chain(optimizer)
        if isinstance(inside._learning_rate, LearningRateSchedule)  # noqa: SLF001
    ]


def learning_rate_functions(optimizer: Any) -> list[tuple[Any, Any]]:
    """Return each optimizer inside, or the optimizer itself, with the function of its rate.

    Those with a number or a schedule are left out. Publicly there is no way to the function.
    """
    return [
        (inside, inside._learning_rate)  # noqa: SLF001
        for inside in optimizer_chain(optimizer)
        if callable(inside._learning_rate)  # noqa: SLF001
        and not isinstance(inside._learning_rate, LearningRateSchedule)  # noqa: SLF001
    ]


def non_trainable_state(model: Any) -> list[Any]:
    """Return all variables that a step changes and training does not, metrics left out.

    The states of stateful RNN layers are among them, which Keras keeps out of a model's variables.
    On JAX it does so too, where `fit` therefore never changes them.
    """
    recurrent = [x for x in flatten_layers(model) if isinstance(x, keras.layers.RNN) and x.stateful]
    kept = [layer.states for layer in recurrent if layer.states is not None]
    return [*model.non_trainable_variables, *keras.tree.flatten(kept)]


def float16_layers(model: Any) -> list[Any]:
    """Return the layers at any depth that compute in float16, the model itself among them."""
    return [layer for layer in flatten_layers(model) if layer.compute_dtype == "float16"]


@contextlib.contextmanager
def preserve_losses(model: Any) -> Iterator[None]:
    """Put back what calls have added to the losses of a model and its layers, and what they forgot.

    A call begins with forgetting the losses of the last one, traced or not; publicly they can be
    read and added to.
    """
    kept = [
        (layer, list(layer._losses), set(layer._loss_ids))  # noqa: SLF001
        for layer in flatten_layers(model)
    ]
    try:
        yield
    finally:
        for layer, losses, ids in kept:
            layer._losses[:] = losses  # noqa: SLF001
            layer._loss_ids.clear()  # noqa: SLF001
            layer._loss_ids.update(ids)  # noqa: SLF001


@contextlib.contextmanager
def unfiltered_tracebacks() -> Iterator[None]:
    """Let exceptions keep the frames of Keras, and their messages as they were raised.

    This is a setting of the thread.
    """
    filtered = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if filtered:
            keras.config.enable_traceback_filtering()


def layers_in_traceback(error: BaseException) -> list[Any]:
    """Return the layers whose methods an exception came through, the innermost_step first, each once.

    Args:
        error: An exception that was raised inside of `unfiltered_tracebacks`.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [frame.f_locals.get("self") for frame in reversed(frames)]
    return list({id(x): x for x in found if isinstance(x, keras.Layer)}.values())


@contextlib.contextmanager
def preserve_layers(model: Any) -> Iterator[None]:
    """Put back what symbolic calls leave in a model and its layers: losses, and attributes.

    A user's layer may keep the scores of its last call, say, or count its calls: tensors, numbers,
    None, and what is in lists, dicts and sets. Numbers and such of stock Keras itself stay. So do
    variables, tensors too on TensorFlow: a layer that is called for the first time makes them.
    """
    stock = {"keras", __name__.partition(".")[0]}
    before = []
    for layer in flatten_layers(model):
        own = type(layer).__module__.partition(".")[0] not in stock
        attributes = own_attributes(layer)
        # Stock layers put new tensors into attributes, and none into what these hold.
        copies = {n: _copied(v) for n, v in attributes.items()} if own else {}
        before.append((layer, own, layer.built, attributes, copies))
    try:
        with preserve_losses(model):
            yield
    finally:
        try:
            _forget_traces(before)
        except BaseException:  # an interrupt
            _forget_traces(before)
            raise


def _forget_traces(before: list[tuple[Any, ...]]) -> None:
    for layer, is_own, was_built, attributes, copies in before:
        # What `build` has set belongs to the variables that it has made.
        own = is_own and layer.built == was_built
        for name, value in own_attributes(layer).items():
            known, old = name in attributes, attributes.get(name)
            if known and value is old:
                _put_back(value, copies.get(name) if own else None)
            elif _has_tensor(value) or (own and _is_number_or_none(value)):
                if known:
                    object.__setattr__(layer, name, old)
                    _put_back(old, copies.get(name))
                else:
                    object.__delattr__(layer, name)


def own_attributes(layer: Any) -> dict[str, Any]:
    """Return the attributes of a layer without those that Keras gives to every layer."""
    of_keras = _attributes_of_keras()
    return {name: value for name, value in vars(layer).items() if name not in of_keras}


@functools.cache
def _attributes_of_keras() -> frozenset[str]:
    return frozenset(vars(keras.Layer(name="layer")))


def _is_number_or_none(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_has_tensor, value.values() if isinstance(value, dict) else value))
    is_tensor = keras.ops.is_tensor(value) or isinstance(value, keras.KerasTensor)
    return is_tensor and not isinstance(value, keras.Variable)


def _copied(value: Any) -> Any:
    # Python's own, and those of Keras. TensorFlow has wrappers with a second copy of the items.
    of_keras = type(value).__module__.partition(".")[0] == "keras"
    cls = type(value).__base__ if of_keras else type(value)
    return next((kind(value) for kind in (list, dict, set) if cls is kind), None)


def _put_back(value: Any, copy: Any) -> None:
    """Let a list, dict or set hold what it values_of; around Keras's own, which track and lock."""
    if isinstance(copy, list):
        list.__setitem__(value, slice(None), copy)
    elif isinstance(copy, dict):
        dict.clear(value)
        dict.update(value, copy)
    elif isinstance(copy, set):
        set.clear(value)
        set.update(value, copy)


def enclosing_callback_list() -> Any | None:
    """Return the `CallbackList` that is calling the callback from which this is called, or None.

    There is no plain way to it. Keras calls callbacks in the order of the user's list, hands each
    the same `logs`, and gives none of them a reference to the list. What happened in an epoch is
    known only at its end, so a callback whose log entries all others are to see must come first
    there. A rule that users put it first would fail silently: it could not check its own place.
    """
    frame = inspect.currentframe()
    for _ in range(_FRAMES):
        frame = frame.f_back if frame else None
        owner = frame.f_locals.get("self") if frame else None
        if isinstance(owner, keras.callbacks.CallbackList):
            return owner
    return None
