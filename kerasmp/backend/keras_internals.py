"""The private names of Keras that kerasmp uses, each with its reason.

`tests/backend/test_keras_internals.py` fails if one of them moves. More private names are used in
`optimizer_internals`, `side_effects`, `keras_graph`, `variable_dtypes`, `profiler` and the backends
of the frameworks, each with tests of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import traceback
from typing import TYPE_CHECKING, Any

import keras
from keras.src.backend import compute_output_spec, get_keras_mask, set_keras_mask
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.variables import AutocastScope
from keras.src.models.functional import Functional
from keras.src.models.model import functional_init_arguments
from keras.src.random.seed_generator import global_seed_generator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "RESULT_OR_LOGS",
    "UPDATE_METRICS",
    "AutocastScope",
    "Functional",
    "autocasts",
    "compute_output_spec",
    "copy_mask",
    "enclosing_callback_list",
    "flatten_layers",
    "float16_layers",
    "functional_init_arguments",
    "layers_in_traceback",
    "mask_of",
    "non_trainable_state",
    "own_variables",
    "preserve_global_seed",
    "preserve_names",
    "set_autocast",
    "set_keras_mask",
    "unfiltered_tracebacks",
    "values_of",
]

# AutocastScope: with None, layers read variables in the variables' own dtype inside `call`; with a
# dtype, in that one. The public `autocast=False` of a variable does the former only, permanently.
# Functional: the class of `keras.Model(inputs, outputs)` has no public name, and kerasmp's models
# that are built from inputs and outputs must inherit from it. functional_init_arguments: how
# `keras.Model` recognizes inputs and outputs; a copy of it could diverge.
# set_keras_mask: how stock Masking attaches its mask to its outputs.
# compute_output_spec: traces any function and changes no state. Publicly, a layer is asked for its
# outputs, and may answer without computing.

# The method with which Keras's train step on JAX updates the metrics. kerasmp wraps it to read the
# loss, which is publicly visible only inside of differentiation.
UPDATE_METRICS = "_update_metrics_variables"
# The method that makes the logs of an epoch from those of its last step and the metrics. Publicly,
# there are only the metrics, which are 0 before they have seen anything.
RESULT_OR_LOGS = "_get_metrics_result_or_logs"

# Keras's attributes for the counts in the names of layers, and for the global seed generator.
_NAME_COUNTS = "object_name_uids"
_SEED_GENERATOR = "global_seed_generator"

_LOGITS = "_keras_logits"

# A subclass that calls super() adds a frame or two; more frames would be another caller's.
_FRAMES = 8


def copy_mask(tensor: Any, other: Any) -> Any:
    """Attach the mask of `tensor` to `other`, and return `other`.

    Losses and metrics use the mask, and `keras.ops.cast` drops it. There is no public way to it.
    """
    mask = get_keras_mask(tensor)
    if mask is not None:
        set_keras_mask(other, mask)
    return other


def mask_of(tensor: Any) -> Any:
    """Return the mask that Keras has attached to a tensor, or None."""
    return get_keras_mask(tensor)


def logits_of(tensor: Any) -> Any:
    """Return the logits that Keras has attached to probabilities, or None.

    A loss on float32 probabilities is computed from these, which is more accurate.
    """
    return getattr(tensor, _LOGITS, None)


def attach_logits(tensor: Any, logits: Any) -> None:
    """Attach logits to probabilities, as Keras's activations do."""
    setattr(tensor, _LOGITS, logits)


@contextlib.contextmanager
def preserve_names() -> Iterator[None]:
    """Count the names of new layers and operations from the start, and restore the counts on exit.

    The counts make names unique, and there is no public way to them.
    """
    before = global_state.get_global_attribute(_NAME_COUNTS)
    global_state.set_global_attribute(_NAME_COUNTS, None)
    try:
        yield
    finally:
        global_state.set_global_attribute(_NAME_COUNTS, before)


@contextlib.contextmanager
def preserve_global_seed() -> Iterator[Any]:
    """Yield the state of Keras's global seed generator, and restore the generator on exit.

    Unseeded random functions draw from it, and the first one creates it. Publicly, it can only be
    set.
    """
    before = global_state.get_global_attribute(_SEED_GENERATOR)
    drawn = random.getstate()  # a new generator takes its seed from there
    state = global_seed_generator().state
    value = keras.ops.copy(state.value)
    try:
        yield state
    finally:
        state.assign(value)
        random.setstate(drawn)
        global_state.set_global_attribute(_SEED_GENERATOR, before)


def flatten_layers(model: Any) -> list[Any]:
    """Return the layer itself and all layers inside it, at any depth.

    The public `layers` lists one level only, without the parts of wrappers and of attention.
    """
    return list(model._flatten_layers())  # noqa: SLF001 - see the docstrings, here and below


def own_variables(layer: Any) -> list[Any]:
    """Return the variables that a layer holds itself, without those of the layers inside it.

    The public `variables` lists both, and those of seed generators, which `add_weight` did not
    create. The states of a stateful RNN layer are included; Keras tracks them nowhere.
    """
    own = [*layer._trainable_variables, *layer._non_trainable_variables]  # noqa: SLF001
    states = getattr(layer, "states", None) if isinstance(layer, keras.layers.RNN) else None
    return own + [s for s in keras.tree.flatten(states) if isinstance(s, keras.Variable)]


def non_trainable_state(model: Any) -> list[Any]:
    """Return all variables that a step changes other than by training, except those of metrics.

    The states of stateful RNN layers are included. Keras does not count them among a model's
    variables, so that `fit` on JAX never changes them.
    """
    found = list(model.non_trainable_variables)
    for layer in flatten_layers(model):
        if isinstance(layer, keras.layers.RNN) and layer.stateful and layer.states is not None:
            found += keras.tree.flatten(layer.states)
    return found


def float16_layers(model: Any) -> list[Any]:
    """Return the layers that compute in float16, at any depth, the model itself included."""
    return [layer for layer in flatten_layers(model) if layer.compute_dtype == "float16"]


def autocasts(variable: Any) -> bool:
    """Return whether layers read a variable in their compute dtype.

    Publicly, this is only an argument of the variable.
    """
    return bool(variable._autocast)  # noqa: SLF001


def set_autocast(variable: Any, *, to: bool) -> None:
    """Set whether layers read a variable in their compute dtype or in its own."""
    variable._autocast = to  # noqa: SLF001


def values_of(variables: Sequence[Any]) -> list[Any]:
    """Return the tensors that variables hold.

    The public `value` looks for scopes and the device each time, which on torch takes as long as a
    small kernel.
    """
    if in_stateless_scope():
        return [v.value for v in variables]
    return [v._value for v in variables]  # noqa: SLF001


@contextlib.contextmanager
def unfiltered_tracebacks() -> Iterator[None]:
    """Keep the frames of Keras in tracebacks, and the original messages of exceptions.

    Keras stores this setting per thread.
    """
    filtered = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if filtered:
            keras.config.enable_traceback_filtering()


def layers_in_traceback(error: BaseException) -> list[Any]:
    """Return the layers whose methods an exception passed through, innermost first, each once.

    Args:
        error: An exception that was raised inside of `unfiltered_tracebacks`.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [frame.f_locals.get("self") for frame in reversed(frames)]
    return list({id(x): x for x in found if isinstance(x, keras.Layer)}.values())


def enclosing_callback_list() -> Any | None:
    """Return the `CallbackList` that is calling the current callback, or None.

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
