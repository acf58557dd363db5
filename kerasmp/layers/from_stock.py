"""Replace the stock layers of a model by those of `kerasmp.layers`, in place and back.

Each replacement is a subclass of the stock layer with the same weights, so it is enough to change
the class of a layer. This module also sets what the constructor and `add_weight` of the replacement
would have set differently. A test compares `vars()` of both, and fails when there is more to set.
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
from kerasmp.backend.keras_internals import (
    autocasts,
    flatten_layers,
    own_variables,
    set_autocast,
)
from kerasmp.layers.attention import EinsumDense as Projection
from kerasmp.layers.attention import stock_projections
from kerasmp.layers.base import Float32Weights, Quantizable, without_type_check
from kerasmp.layers.masking import as_it_comes, differs
from kerasmp.layers.products import Float32BiasGradient
from kerasmp.ops.precision import OneNode, upcast_dtype
from kerasmp.policy.apply import recast_statistics
from kerasmp.policy.locations import Location, locations
from kerasmp.policy.safe import ATTENTION

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from kerasmp.policy.apply import Undo

# These keep their stock activation. The first two compute any activation in float32, and losses use
# the logits of a stock softmax or sigmoid at the end of a model. For the others, Keras compares
# activations by identity before it uses cuDNN. Projections have none.
_KEEPING_ACTIVATION = (
    layers.Activation,
    layers.DenseHead,
    keras.layers.RNN,
    keras.layers.LSTMCell,
    keras.layers.GRUCell,
    Projection,
)


def swap_stock_layers(model: Any, undo: Undo, only: Container[int] | None = None) -> dict[int, str]:
    """Replace every stock layer of a model that `kerasmp.layers` has a replacement for, in place.

    This includes layers at any depth whose class is exactly a stock one, except quantized layers,
    layers inside `kerasmp.layers.WithDtype`, and layers that attention, or a subclass of LSTM or
    GRU, creates itself. The projections of attention are replaced with it. A stock Dense that
    produces the model's outputs becomes a `DenseHead`, unless the model's own constructor would
    create it as a Dense again. Stock activations inside the layers are replaced by those of
    `kerasmp.ops`, except in recurrent layers and attention. The variables stay the same objects.
    Compiled steps still use the old layers: the caller must reset them.

    Args:
        model: A model. Layers that are not built yet may not have created their inner layers.
        undo: A list that receives, before each change, a function that reverts it. `take_back`
            restores the model, also after an error midway.
        only: The `id`s of the layers that may be replaced. Defaults to all layers.

    Returns:
        A dict from the `id` of each replaced layer to the name of its previous class.

    Example:

    >>> from kerasmp.policy.apply import take_back
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Softmax(), keras.layers.Dense(2)])
    >>> undo = []
    >>> names = swap_stock_layers(model, undo)
    >>> [type(layer).__name__ for layer in model.layers], list(names.values())
    (['Softmax', 'DenseHead'], ['Softmax', 'Dense'])
    >>> take_back(undo)
    >>> [type(layer).__module__.partition(".")[0] for layer in model.layers]
    ['keras', 'keras']
    """
    swaps = plan_swaps(locations(model), only)
    names = {id(layer): type(layer).__name__ for layer, _ in swaps}
    # The output of a head becomes float32 under a low-precision policy.
    changes_dtypes = any(
        cls is layers.DenseHead and upcast_dtype(layer.compute_dtype) != layer.compute_dtype
        for layer, cls in swaps
    )
    if changes_dtypes:
        undo.append(functools.partial(refresh_symbolic_dtypes, model))
    apply_swaps(model, swaps, undo)
    if changes_dtypes:
        refresh_symbolic_dtypes(model)
    return names


def plan_swaps(
    found: Iterable[tuple[Any, Location]], only: Container[int] | None = None
) -> list[tuple[Any, type]]:
    """Return the layers to replace, each with its new class, as `swap_stock_layers` explains.

    Args:
        found: The layers and locations that `kerasmp.policy.locations.locations` yields.
        only: As for `swap_stock_layers`.
    """
    closed: set[int] = set()
    swaps: list[tuple[Any, type]] = []
    for layer, location in found:
        inside = id(location.holder) in closed
        if inside or _creates_its_layers(layer):
            closed.add(id(layer))
        quantized = policy_of(layer).quantization_mode is not None
        cls = None if inside or quantized else _replacement(layer, location)
        if cls is None or (only is not None and id(layer) not in only):
            continue
        swaps.append((layer, cls))
        if isinstance(layer, ATTENTION):
            parts = stock_projections(layer)
            swaps += [(x, Projection) for x in parts if policy_of(x).quantization_mode is None]
    return swaps


def apply_swaps(model: Any, swaps: Iterable[tuple[Any, type]], undo: Undo) -> None:
    """Give layers their new classes. The dtypes of symbolic tensors are not updated.

    Args:
        model: The model.
        swaps: The result of `plan_swaps`.
        undo: As for `swap_stock_layers`.
    """
    holders = Counter(id(v) for layer in flatten_layers(model) for v in own_variables(layer))
    for layer, cls in swaps:
        _swap(layer, cls, holders, undo)


@functools.cache
def layer_replacements() -> dict[type, type]:
    """Return a dict from stock classes to the classes of `kerasmp.layers` that replace them.

    Example:

    >>> layer_replacements()[keras.layers.Softmax].__module__
    'kerasmp.layers.in_float32'
    """
    pairs = ((getattr(keras.layers, name, None), getattr(layers, name)) for name in layers.__all__)
    return {stock: cls for stock, cls in pairs if stock is not None and issubclass(cls, stock)}


@functools.cache
def activation_replacements() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return the stock activations that are unsafe in float16, each with its replacement.

    Example:

    >>> [new.__module__ for old, new in activation_replacements() if old is keras.activations.gelu]
    ['kerasmp.ops.activations']
    """
    names = [name for name in ops.__all__ if hasattr(keras.activations, name)]
    return [
        (getattr(module, name), getattr(ops, name))
        for module in (keras.activations, keras.ops)
        for name in names
        if hasattr(module, name) and _has_same_defaults(getattr(module, name), getattr(ops, name))
    ]


def _has_same_defaults(stock: Callable[..., Any], new: Callable[..., Any]) -> bool:
    # The new one may have more. `keras.ops.gelu` approximates, `keras.activations.gelu` does not.
    defaults = [
        [parameter.default for parameter in inspect.signature(function).parameters.values()]
        for function in (stock, new)
    ]
    return all(one == other for one, other in zip(*defaults, strict=False))


def _replacement(layer: Any, location: Location) -> type | None:
    if type(layer) is keras.layers.Dense and location.final and _is_rebuilt(location.holder):
        return layers.DenseHead
    return layer_replacements().get(type(layer))


def _is_rebuilt(holder: Any) -> bool:
    """Return whether a file records the classes of the layers inside, so that they are restored.

    A user-defined model creates its layers itself, and expects the weights of a Dense in a file.
    """
    return type(holder).__module__.partition(".")[0] in {"keras", __name__.partition(".")[0]}


def _creates_its_layers(layer: Any) -> bool:
    """Return whether a constructor creates the layers inside, so that files cannot change them."""
    is_recurrent_subclass = isinstance(layer, (keras.layers.LSTM, keras.layers.GRU)) and (
        type(layer) not in layer_replacements()
    )
    keeps = getattr(layer, "keeps_its_dtype", False)
    return isinstance(layer, ATTENTION) or is_recurrent_subclass or keeps


def _swap(layer: Any, cls: type, holders: Counter[int], undo: Undo) -> None:
    if isinstance(layer, keras.layers.Normalization):
        undo.append(functools.partial(recast_statistics, layer))  # runs after the class is restored
    old_dtype = layer.compute_dtype
    if isinstance(layer, keras.layers.Masking):  # while it still has the stock class
        _compare_before_rounding(layer, undo)
    _set(layer, "__class__", cls, undo)
    for variable in _without_autocast(layer):
        # Another layer that holds the variable relies on the autocast.
        if holders[id(variable)] == 1 and autocasts(variable):
            undo.append(functools.partial(set_autocast, variable, to=True))
            set_autocast(variable, to=False)
    if isinstance(layer, Quantizable):
        _set(layer, "quantize", without_type_check(layer.quantize), undo)
    if isinstance(layer, layers.ActivityRegularization):
        # With a name, Keras does not count this layer in its automatic names.
        new = type(layer)(layer.l1, layer.l2, name=layer.name)
        _set(layer, "activity_regularizer", new.activity_regularizer, undo)
    if layer.compute_dtype != old_dtype:  # only Normalization
        recast_statistics(layer)
    if not isinstance(layer, _KEEPING_ACTIVATION):
        _replace_activation(layer, undo)


def _compare_before_rounding(layer: Any, undo: Undo) -> None:
    """Make a Masking, and its mask operations in graphs, compare unrounded inputs."""
    _set(layer, "autocast", False, undo)
    for cast, comparison in mask_operations(layer):
        _set_function(comparison, differs, undo)
        if cast is not None:
            _set_function(cast, as_it_comes, undo)


def _set_function(operation: Any, function: Callable[..., Any], undo: Undo) -> None:
    """Make an operation in a graph, not a layer, compute a function instead."""
    for name, value in (("function", function), ("original", None)):
        undo.append(functools.partial(vars(operation).pop, name, None))
        vars(operation)[name] = value
    _set(operation, "__class__", OneNode, undo)


def _without_autocast(layer: Any) -> list[Any]:
    """Return the variables of a layer for which its class turns autocasting off."""
    variables = own_variables(layer)
    if isinstance(layer, Float32Weights):
        return variables
    if isinstance(layer, Float32BiasGradient) and current().SUMS_IN_COMPUTE_DTYPE:
        return [v for v in variables if v.name == "bias"]
    return []


def _replace_activation(layer: Any, undo: Undo) -> None:
    activation = vars(layer).get("activation")
    for stock, new in activation_replacements():
        if stock is activation:
            _set(layer, "activation", new, undo)
            return


def _set(layer: Any, name: str, value: Any, undo: Undo) -> None:
    # Not through Keras's __setattr__, which tracks values and locks built layers.
    undo.append(functools.partial(object.__setattr__, layer, name, getattr(layer, name)))
    object.__setattr__(layer, name, value)
