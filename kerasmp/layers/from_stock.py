"""Stock layers into those of `kerasmp.layers`, in place and back.

Each of ours is a subclass of the stock one with the same weights, so that a layer is turned by its
class. What our constructors and `add_weight` set otherwise is set here; the test that compares
`vars()` of the two tells when there comes to be more.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import layers, ops
from kerasmp.backend import current
from kerasmp.backend.keras_graph import mask_operations, policy_of, refresh_symbolic_dtypes
from kerasmp.backend.keras_internals import autocasts, flatten_layers, own_variables, set_autocast
from kerasmp.layers.bias import WideBias
from kerasmp.layers.in_float32 import NeverCastWeights
from kerasmp.layers.masking import as_it_comes, differs
from kerasmp.layers.projection import EinsumDense as Projection
from kerasmp.layers.projection import projections_in
from kerasmp.layers.quantizing import QuantizesAsStock, without_type_check
from kerasmp.ops.precision import OneNode, upcast_dtype
from kerasmp.policy.apply import recast_statistics
from kerasmp.policy.locations import Location, locations
from kerasmp.policy.safe import ATTENTION

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from kerasmp.policy.apply import Undo

# They compute their activation in float32, whichever it is. Left as it is, losses recognise a
# stock softmax or sigmoid at the end of a model, and go by its logits.
_ACTIVATED_IN_FLOAT32 = (layers.Activation, layers.DenseHead)
# Keras asks for stock functions by identity before it takes cuDNN.
_RECURRENT = (keras.layers.RNN, keras.layers.LSTMCell, keras.layers.GRUCell)


def turn_to_safe(model: Any, undo: Undo, only: Container[int] | None = None) -> dict[int, str]:
    """Turn every stock layer of a model that has a float16-safe counterpart into it, in place.

    Meant are layers at any depth whose class is exactly a stock one, up to those that are quantised
    or inside `kerasmp.layers.WithDtype`, and those that attention, or a subclass of LSTM or GRU,
    makes for itself; the projections of attention are turned with it. A stock Dense that makes the
    model's outputs becomes a `DenseHead`, unless the model's own constructor would make it a Dense
    again. Stock activations inside become those of `kerasmp.ops`, except for recurrent ones and for
    those that attention has. Weights stay the variables that they are. Steps that are compiled go
    on with what it was: to forget them is the caller's.

    Args:
        model: A model. What is not built yet has no parts that could be found.
        undo: Is given, before each single change, what takes it back: `take_back` makes the model
            what it was, also after an error midway.
        only: The `id`s of the layers that may be turned; None for all.

    Returns:
        From `id(layer)` to the name of the class that the layer had.

    Example:

    >>> from kerasmp.policy.apply import take_back
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Softmax(), keras.layers.Dense(2)])
    >>> undo = []
    >>> names = turn_to_safe(model, undo)
    >>> [type(layer).__name__ for layer in model.layers], list(names.values())
    (['Softmax', 'DenseHead'], ['Softmax', 'Dense'])
    >>> take_back(undo)
    >>> [type(layer).__module__.partition(".")[0] for layer in model.layers]
    ['keras', 'keras']
    """
    swaps = counterparts(locations(model), only)
    names = {id(layer): type(layer).__name__ for layer, _ in swaps}
    # A head's output is float32 where the policy is a narrow one.
    widens = any(ours is layers.DenseHead and _is_narrow(layer) for layer, ours in swaps)
    if widens:
        undo.append(functools.partial(refresh_symbolic_dtypes, model))
    swap(model, swaps, undo)
    if widens:
        refresh_symbolic_dtypes(model)
    return names


def counterparts(
    found: Iterable[tuple[Any, Location]], only: Container[int] | None = None
) -> list[tuple[Any, type]]:
    """Decide which layers get which class of ours, as `turn_to_safe` says. Nothing is changed.

    Args:
        found: What `kerasmp.policy.locations.locations` yields of a model.
        only: As for `turn_to_safe`.
    """
    closed: set[int] = set()
    answers: list[tuple[Any, type]] = []
    for layer, location in found:
        inside = id(location.holder) in closed
        if inside or _keeps_its_parts(layer):
            closed.add(id(layer))
        quantised = policy_of(layer).quantization_mode is not None
        ours = None if inside or quantised else _counterpart(layer, location)
        if ours is None or (only is not None and id(layer) not in only):
            continue
        answers.append((layer, ours))
        if isinstance(layer, ATTENTION):
            parts = [x for x in projections_in(layer) if policy_of(x).quantization_mode is None]
            answers += [(part, Projection) for part in parts]
    return answers


def swap(model: Any, swaps: Iterable[tuple[Any, type]], undo: Undo) -> None:
    """Give layers the classes that were decided on; what graphs say of dtypes is left as it is.

    Args:
        model: The model.
        swaps: What `counterparts` returned.
        undo: As for `turn_to_safe`.
    """
    holders = Counter(id(v) for layer in flatten_layers(model) for v in own_variables(layer))
    for layer, ours in swaps:
        _turn(layer, ours, holders, undo)


@functools.cache
def stock_to_safe() -> dict[type, type]:
    """Return the stock classes that have a counterpart under the same name, with it.

    Example:

    >>> stock_to_safe()[keras.layers.Softmax].__module__
    'kerasmp.layers.activations'
    """
    pairs = ((getattr(keras.layers, name, None), getattr(layers, name)) for name in layers.__all__)
    return {stock: ours for stock, ours in pairs if stock is not None and issubclass(ours, stock)}


@functools.cache
def safe_activations() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return the stock activations that overflow or round in float16, each with ours.

    Example:

    >>> [ours.__module__ for stock, ours in safe_activations() if stock is keras.activations.gelu]
    ['kerasmp.ops.activations']
    """
    names = [name for name in ops.__all__ if hasattr(keras.activations, name)]
    return [
        (getattr(module, name), getattr(ops, name))
        for module in (keras.activations, keras.ops)
        for name in names
        if hasattr(module, name) and _has_defaults_of(getattr(module, name), getattr(ops, name))
    ]


def _has_defaults_of(stock: Callable[..., Any], ours: Callable[..., Any]) -> bool:
    # Ours may take more. `keras.ops.gelu` approximates where `keras.activations.gelu` does not.
    defaults = [
        [parameter.default for parameter in inspect.signature(function).parameters.values()]
        for function in (stock, ours)
    ]
    return all(one == other for one, other in zip(*defaults, strict=False))


def _counterpart(layer: Any, location: Location) -> type | None:
    if type(layer) is keras.layers.Dense and location.final and _is_rebuilt(location.holder):
        return layers.DenseHead
    return stock_to_safe().get(type(layer))


def _is_rebuilt(holder: Any) -> bool:
    """Return whether a file has the classes of the layers inside, and makes those again.

    A user's model makes its layers itself, and looks for a Dense's weights under that name.
    """
    return type(holder).__module__.partition(".")[0] in {"keras", __name__.partition(".")[0]}


def _keeps_its_parts(layer: Any) -> bool:
    """Return whether the layers inside are made by a constructor, which files do not ask."""
    own_recurrent = isinstance(layer, (keras.layers.LSTM, keras.layers.GRU)) and (
        type(layer) not in stock_to_safe()
    )
    keeps = getattr(layer, "keeps_its_dtype", False)
    return isinstance(layer, ATTENTION) or own_recurrent or keeps


def _is_narrow(layer: Any) -> bool:
    return upcast_dtype(layer.compute_dtype) != str(layer.compute_dtype)


def _turn(layer: Any, ours: type, holders: Counter[int], undo: Undo) -> None:
    if isinstance(layer, keras.layers.Normalization):
        undo.append(functools.partial(recast_statistics, layer))  # when its class is what it was
    computed_in = layer.compute_dtype
    if isinstance(layer, keras.layers.Masking):  # while its class is stock Keras's
        _compare_unrounded(layer, undo)
    _set(layer, "__class__", ours, undo)
    for variable in _never_cast(layer):
        # Another layer that holds it counts on the cast.
        if holders[id(variable)] == 1 and autocasts(variable):
            undo.append(functools.partial(set_autocast, variable, to=True))
            set_autocast(variable, to=False)
    if isinstance(layer, QuantizesAsStock):
        _set(layer, "quantize", without_type_check(layer.quantize), undo)
    if isinstance(layer, layers.ActivityRegularization):
        # The name keeps Keras from counting this one among the layers it has to name.
        like = type(layer)(layer.l1, layer.l2, name=layer.name)
        _set(layer, "activity_regularizer", like.activity_regularizer, undo)
    if layer.compute_dtype != computed_in:  # Normalization's
        recast_statistics(layer)
    if not isinstance(layer, (*_ACTIVATED_IN_FLOAT32, *_RECURRENT, Projection)):
        _activate_safely(layer, undo)


def _compare_unrounded(layer: Any, undo: Undo) -> None:
    """Let a Masking, and what a graph has made of it, compare inputs as they come."""
    _set(layer, "autocast", False, undo)
    for cast, comparison in mask_operations(layer):
        _compute_by(differs, comparison, undo)
        if cast is not None:
            _compute_by(as_it_comes, cast, undo)


def _compute_by(function: Callable[..., Any], operation: Any, undo: Undo) -> None:
    """Let an operation that is a node of a graph, and no layer, compute something else."""
    for name, value in (("function", function), ("original", None)):
        undo.append(functools.partial(vars(operation).pop, name, None))
        vars(operation)[name] = value
    _set(operation, "__class__", OneNode, undo)


def _never_cast(layer: Any) -> list[Any]:
    """Return the variables that no autocast narrows in a layer of this class."""
    variables = own_variables(layer)
    if isinstance(layer, NeverCastWeights):
        return variables
    narrow_sums = isinstance(layer, WideBias) and current().SUMS_IN_COMPUTE_DTYPE
    return [v for v in variables if narrow_sums and v.name == "bias"]


def _activate_safely(layer: Any, undo: Undo) -> None:
    present = vars(layer).get("activation")
    for stock, ours in safe_activations():
        if stock is present:
            _set(layer, "activation", ours, undo)
            return


def _set(layer: Any, name: str, value: Any, undo: Undo) -> None:
    # Around Keras's own __setattr__, which tracks what it is given and locks built layers.
    undo.append(functools.partial(object.__setattr__, layer, name, getattr(layer, name)))
    object.__setattr__(layer, name, value)
