"""The rule set "safe": the stock layers that compute in float32 under a half precision policy.

A rule exists only if running a whole layer in float32 is right and cheap. Matrix products are what
half precision is for, so they stay in it, except for heads and some layers of `WITH_ACTIVATION` and
`RECURRENT`. For other layers that half precision harms, `kerasmp.layers` has a replacement. The
numbers of the hazards are those in docs/rules.md.
"""

from __future__ import annotations

import collections
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from kerasmp.backend import (
    compares_in_float32,
    draws_dropout_in_compute_dtype,
    draws_noise_in_compute_dtype,
    layers_without_kernel,
    multiplies_mixed_dtypes,
    resizes_gradients_in_float32,
    sums_rows_in_table_dtype,
)
from kerasmp.backend.keras_graph import calls, children, graph_of
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.policy.locations import SPECTRA, exact_inputs_in
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kerasmp.policy.locations import Location

layers = keras.layers

_PACKAGE = __name__.partition(".")[0]

# The number of different uniform random numbers in half precision.
_UNIFORM_NUMBERS = {"float16": 2**10, "bfloat16": 2**7}
# The largest accepted relative error of the share that is dropped, and of the share that is kept.
_LARGEST_SHARE_ERROR = 0.05

# Up to this size, the error of a float16 sum is at most four times the smallest possible error.
LARGEST_WINDOW = 16

ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)
# Recurrent layers and cells without a replacement in `kerasmp.layers`.
RECURRENT = (layers.SimpleRNNCell, layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D)
WITH_ACTIVATION = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)
PROBABILITIES = ("softmax", "sigmoid")
UNSAFE_ACTIVATIONS = (
    *PROBABILITIES,
    "tanh",
    "gelu",
    "silu",
    "mish",
    "hard_silu",
    "squareplus",
)


class SafeRule(NamedTuple):
    """One rule of the set, for layers that compute in float32.

    Args:
        name: Its name.
        hazard: The numbers of the hazards in docs/rules.md.
        reason: What goes wrong in half precision.
        classes: The class, or classes, of the layers to which it applies.
        when: Returns whether it applies to such a layer at a location.
        covers_parts: Whether the rule also covers the layers inside.
        covers_kerasmp: Whether the rule also covers layers of kerasmp, which protect themselves
            from the other hazards.
        is_about_inputs: Whether the hazard lies in the layer's inputs, from which no layer can
            protect itself.
    """

    name: str
    hazard: str
    reason: str
    classes: type | tuple[type, ...]
    when: Callable[[Any, Location], bool] = lambda *_: True
    covers_parts: bool = False
    covers_kerasmp: bool = False
    is_about_inputs: bool = False


def safe_rule(layer: Any, location: Location, *, is_protected: bool = False) -> SafeRule | None:
    """Return the first rule that applies to a layer, or None.

    Args:
        layer: A layer.
        location: Its location.
        is_protected: Whether the layer that contains it protects it.

    Example:

    >>> from kerasmp.policy.locations import Location
    >>> safe_rule(keras.layers.Softmax(), Location("softmax")).hazard
    '3, 14, 18, 19'
    >>> safe_rule(keras.layers.Dense(2), Location("dense")) is None
    True
    """
    is_kerasmp = is_kerasmp_layer(layer)
    is_protected = is_protected or (is_kerasmp and getattr(layer, "gives_float32", False))
    for rule in RULES:
        if is_kerasmp and not rule.covers_kerasmp:
            continue
        if is_protected and not rule.is_about_inputs:
            continue
        if isinstance(layer, rule.classes) and rule.when(layer, location):
            return rule
    return None


def is_kerasmp_layer(layer: Any) -> bool:
    """Return whether the class of a layer, or a base class of it, is defined in kerasmp."""
    return any(_package(cls) == _PACKAGE for cls in type(layer).__mro__)


def activation_name(layer: Any) -> str:
    """Return the name of a layer's activation: "linear" for none, "" for one of kerasmp."""
    activation = getattr(layer, "activation", None)
    if activation is None:
        return "linear"
    return "" if _package(activation) == _PACKAGE else getattr(activation, "__name__", "")


def loses_mask_value(value: Any, half: str) -> bool:
    """Return whether stock Masking misses its value, since only its inputs are rounded.

    Args:
        value: The mask value.
        half: The dtype to which the inputs are rounded.
    """
    return compares_in_float32(value) and _changes_in(value, half)


def _changes_in(value: Any, half: str) -> bool:
    number = keras.ops.convert_to_numpy(value)
    if half not in HALVES or number.dtype.kind in "biu":
        return False
    wide = number.astype("float32")
    if half == "bfloat16":  # NumPy lacks this dtype, which is the first half of float32's bits
        changes = (wide.view("uint32") & 0xFFFF) != 0
    else:
        with np.errstate(over="ignore"):
            changes = wide.astype("float16") != wide
    return bool(np.any(changes & ~np.isnan(wide)))  # NaN equals nothing in any dtype


def dropped_share(rate: float, half: str) -> float:
    """Return the share of its inputs that stock Keras drops in half precision.

    Example:

    >>> dropped_share(0.001, "bfloat16")
    0.0078125
    """
    return math.ceil(rate * _UNIFORM_NUMBERS[half]) / _UNIFORM_NUMBERS[half]


def drops_wrong_share(rate: float, half: str) -> bool:
    """Return whether the share that stock Keras drops, or keeps, is wrong in half precision.

    Args:
        rate: The share that it should drop.
        half: The dtype of the inputs.
    """
    if half not in HALVES or not draws_dropout_in_compute_dtype():
        return False
    error = abs(dropped_share(rate, half) - rate)
    return error > _LARGEST_SHARE_ERROR * min(rate, 1 - rate)


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]


def _has_no_kernel(layer: Any, location: Location) -> bool:
    return isinstance(layer, layers_without_kernel(location.half))


def _makes_or_receives_spectra(layer: Any, location: Location) -> bool:
    return isinstance(layer, SPECTRA) or location.spectra


def _is_head(layer: Any, location: Location) -> bool:
    # No rule can set what a user-defined layer with layers inside returns.
    is_user_defined = _package(type(layer)) not in {"keras", _PACKAGE}
    return location.final and not (is_user_defined and children(layer))


def _sums_outputs(layer: Any, _: Location) -> bool:
    if isinstance(layer, layers.ActivityRegularization):
        return not is_kerasmp_layer(layer)
    return getattr(layer, "activity_regularizer", None) is not None


def _is_scores_part(layer: Any, location: Location) -> bool:
    """With a float32 query the scores are float32; keys, values and the output stay as they are."""
    # Only torch cannot multiply a float32 tensor by a float16 one.
    projections = ("query",) if multiplies_mixed_dtypes() else ("query", "key", "value")
    return isinstance(location.holder, ATTENTION) and (
        isinstance(layer, (layers.Softmax, layers.Dropout)) or layer.name in projections
    )


def _has_unprotected_cell(layer: Any, _: Location) -> bool:
    return any(isinstance(part, RECURRENT) for part in flatten_layers(layer))


def _rounds_data(layer: Any, location: Location) -> bool:
    # A model with a graph does not cast its inputs.
    parts = exact_inputs_in(layer) if graph_of(layer) is None else []
    return any(
        not isinstance(each, layers.Masking) or _changes_in(each.mask_value, location.half)
        for each in (*parts, *location.feeds)
        if each is not layer
    )


# Their gradients accept a float32 gradient under TensorFlow's XLA. Most others, such as that of
# ReLU, do not, and these pass it on.
_ACCEPTING_FLOAT32 = (
    layers.Conv2D,
    layers.Conv2DTranspose,
    layers.Dense,
    layers.DepthwiseConv2D,
    layers.SeparableConv2D,
)


def _is_resampled(layer: Any) -> bool:
    """Return whether TensorFlow scales images with an operation that returns float32."""
    antialiased = getattr(layer, "antialias", False) and layer.interpolation != "nearest"
    return bool(antialiased or layer.interpolation.startswith("lanczos"))


def _has_no_half_gradient(layer: Any, location: Location) -> bool:
    return (
        resizes_gradients_in_float32()
        and _is_resampled(layer)
        and not _comes_from_inputs(layer, location, through=())
    )


def _returns_float32_gradient(layer: Any, location: Location) -> bool:
    # XLA cannot compile "bicubic" in any dtype, and other compilers get its gradient right.
    keeps_ratio = any(getattr(layer, f"{way}_to_aspect_ratio", False) for way in ("crop", "pad"))
    through = () if keeps_ratio else _ACCEPTING_FLOAT32
    return (
        resizes_gradients_in_float32()
        and layer.interpolation == "bilinear"
        and not _is_resampled(layer)
        and not _comes_from_inputs(layer, location, through=through)
    )


def _comes_from_inputs(layer: Any, location: Location, through: tuple[type, ...]) -> bool:
    """Return whether a layer receives inputs of the model, or these after plain products only.

    Args:
        layer: The layer.
        location: Its location.
        through: The classes of layers that may be between, if they have no activation.
    """
    graph = graph_of(location.holder)
    if graph is None or location.depth != 1:  # an inner model's inputs may need gradients
        return False
    every = calls(graph)
    makers = {id(tensor): call for call in every for tensor in call.outputs}
    used = collections.Counter(id(x) for call in every for x in call.inputs)
    used.update(map(id, graph.outputs))
    pending = [tensor for call in every if call.operation is layer for tensor in call.inputs]
    while pending:
        call = makers[id(tensor := pending.pop())]
        if isinstance(call.operation, layers.InputLayer):
            continue
        if used[id(tensor)] > 1 or not _is_plain_product(call.operation, through):
            return False
        pending += call.inputs
    return True


def _is_plain_product(layer: Any, classes: tuple[type, ...]) -> bool:
    return (
        isinstance(layer, classes)
        and activation_name(layer) == "linear"
        and getattr(layer, "activity_regularizer", None) is None
        and bool(np.all(np.equal(getattr(layer, "dilation_rate", 1), 1)))
    )


RULES = (
    SafeRule(
        "kernel",
        "22",
        "it fails on this backend: an operation or its gradient has no kernel",
        layers.Layer,
        _has_no_kernel,
        covers_parts=True,
    ),
    SafeRule(
        "spectrum",
        "23",
        "the spectra of loud sound overflow until a layer normalizes them",
        layers.Layer,
        _makes_or_receives_spectra,
        covers_kerasmp=True,
        is_about_inputs=True,
    ),
    SafeRule(
        "head",
        "1, 18",
        "losses, metrics and predictions see the model's outputs, and half precision rounds them",
        layers.Layer,
        _is_head,
        covers_parts=True,
        covers_kerasmp=True,
    ),
    SafeRule(
        "activity",
        "6",
        "the sum over a layer's outputs overflows",
        layers.Layer,
        _sums_outputs,
        covers_kerasmp=True,
    ),
    SafeRule(
        "softmax",
        "3, 14, 18, 19",
        "a softmax in half precision loses small probabilities, and its mask is not low enough",
        layers.Softmax,
    ),
    SafeRule(
        "scores",
        "2, 3",
        "attention's scores overflow, and its softmax rounds them",
        layers.Layer,
        _is_scores_part,
    ),
    SafeRule(
        "attention",
        "4, 5, 17",
        "the scores overflow, and sums over them lose small terms",
        (layers.Attention, layers.AdditiveAttention),
    ),
    SafeRule(
        "probabilities",
        "1, 15",
        "the gradient of softmax and sigmoid is computed from the rounded probability",
        WITH_ACTIVATION,
        lambda layer, _: activation_name(layer) in PROBABILITIES,
        covers_kerasmp=True,
    ),
    SafeRule(
        "activation",
        "11, 15",
        "its gradient overflows, or is computed from the rounded output",
        layers.Activation,
        lambda layer, _: activation_name(layer) in UNSAFE_ACTIVATIONS,
    ),
    SafeRule(
        "normalization",
        "7, 8",
        "statistics and sums of squares overflow or vanish",
        (layers.Normalization, layers.UnitNormalization),
    ),
    SafeRule(
        "cosine",
        "8",
        "sums of squares overflow or vanish",
        layers.Dot,
        lambda layer, _: bool(layer.normalize),
    ),
    SafeRule(
        "pooling",
        "9",
        f"the sum over a window of more than {LARGEST_WINDOW} values loses small terms",
        (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D),
        lambda layer, _: math.prod(layer.pool_size) > LARGEST_WINDOW,
    ),
    SafeRule(
        "masked-pooling",
        "10",
        "the sum over a masked sequence overflows",
        layers.GlobalAveragePooling1D,
        lambda _, location: location.masked is not False,
    ),
    SafeRule(
        "average",
        "16",
        "the sum overflows before it is divided",
        layers.Average,
    ),
    SafeRule(
        "spectral",
        "13",
        "the float32 kernel is rounded to half precision by one training step",
        layers.SpectralNormalization,
    ),
    SafeRule(
        "interpolation",
        "20",
        "under TensorFlow's XLA its gradient mixes two dtypes, which is an error",
        (layers.UpSampling2D, layers.Resizing),
        _returns_float32_gradient,
    ),
    SafeRule(
        "resampling",
        "20",
        "on TensorFlow its gradient mixes two dtypes, which is an error",
        (layers.UpSampling2D, layers.Resizing),
        _has_no_half_gradient,
    ),
    SafeRule(
        "embedding",
        "21",
        "the gradient of an id that occurs often in a batch is summed in half precision",
        layers.Embedding,
        lambda *_: sums_rows_in_table_dtype(),
    ),
    SafeRule(
        "recurrent",
        "12",
        "its bias gradient, a sum over batch, steps and positions, accumulates rounding errors",
        layers.RNN,
        _has_unprotected_cell,
        covers_parts=True,
        covers_kerasmp=True,
    ),
    SafeRule(
        "mask-value",
        "24",
        "half precision rounds its inputs but not its mask value, so no step is masked",
        layers.Masking,
        lambda layer, location: loses_mask_value(layer.mask_value, location.half),
    ),
    SafeRule(
        "data",
        "27",
        "it would round data that a layer inside or after it needs exactly",
        layers.Layer,
        _rounds_data,
        covers_kerasmp=True,
        is_about_inputs=True,
    ),
    SafeRule(
        "dropout",
        "25",
        "there are so few random numbers that the dropped share differs from the rate",
        layers.Dropout,
        lambda layer, location: drops_wrong_share(layer.rate, location.half),
    ),
    SafeRule(
        "noise",
        "26",
        "there are few random numbers, and their mean is wrong",
        (layers.GaussianNoise, layers.GaussianDropout),
        lambda *_: draws_noise_in_compute_dtype(),
    ),
)
