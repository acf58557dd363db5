"""The rule set "safe": which stock layers, and which places, compute in float32 and not in half.

Only where a whole layer in float32 is right and cheap. Products of matrices, which are what half
precision is for, stay in it, but for heads and for what `WITH_ACTIVATION` and `STEPPING` list; for
others that it hurts there are layers in `kerasmp.layers`. The numbers are those of docs/rules.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from kerasmp.backend import (
    compares_in_float32,
    drops_in_own_dtype,
    layers_without_kernel,
    makes_noise_in_own_dtype,
    multiplies_mixed,
    sums_rows_narrowly,
)
from kerasmp.backend.keras_graph import children, graph_of
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.policy.locations import SPECTRA, takers_in
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kerasmp.policy.locations import Location

layers = keras.layers

_PACKAGE = __name__.partition(".")[0]

# As many uniform numbers are there in half precision, one step from each other.
_UNIFORM = {"float16": 2**10, "bfloat16": 2**7}
# How far off the share of what is dropped, or of what is kept, may be.
_SHARE_OFF = 0.05

# Up to this size the error of a float16 sum stays within four times the best possible one.
LARGEST_WINDOW = 16

ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)
NOISE = (layers.GaussianNoise, layers.GaussianDropout)
POOLING = (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)
# What steps through time, and has no counterpart in `kerasmp.layers`.
STEPPING = (layers.SimpleRNNCell, layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D)
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
    """One rule of the set: what it claims computes in float32.

    Args:
        name: Its name.
        hazard: The number in the table of docs/rules.md.
        reason: What goes wrong in half precision.
        claims: Whether a layer at a place is meant.
        inside: Whether the layers inside are meant, too.
        ours: Whether layers of this package are meant, too, which look after the rest themselves.
        takes: Whether it is about what a layer is given, for which none can look after itself.
    """

    name: str
    hazard: str
    reason: str
    claims: Callable[[Any, Location], bool]
    inside: bool = False
    ours: bool = False
    takes: bool = False


def safe_rule(layer: Any, location: Location, *, looked_after: bool = False) -> SafeRule | None:
    """Return the first rule that claims a layer, or None.

    Args:
        layer: A layer.
        location: Where it stands.
        looked_after: Whether the layer that holds it looks after it.

    Example:

    >>> from kerasmp.policy.locations import Location
    >>> safe_rule(keras.layers.Softmax(), Location("softmax")).hazard
    '3, 14, 18, 19'
    >>> safe_rule(keras.layers.Dense(2), Location("dense")) is None
    True
    """
    ours = is_kerasmp_layer(layer)
    looked_after = looked_after or (ours and getattr(layer, "gives_float32", False))
    rules = (rule for rule in RULES if (rule.ours or not ours) and (rule.takes or not looked_after))
    return next((rule for rule in rules if rule.claims(layer, location)), None)


def is_kerasmp_layer(layer: Any) -> bool:
    """Return whether a layer is of this package, or derived."""
    return any(cls.__module__.partition(".")[0] == _PACKAGE for cls in type(layer).__mro__)


def activation_name(layer: Any) -> str:
    """Return the name of the activation that a layer applies, "linear" for none, "" for ours."""
    activation = getattr(layer, "activation", None)
    if getattr(activation, "__module__", "").partition(".")[0] == _PACKAGE:
        return ""
    return "linear" if activation is None else str(getattr(activation, "__name__", ""))


def loses_mask_value(value: Any, half: str) -> bool:
    """Return whether stock Masking looks for a value among inputs that are rounded to another one.

    Args:
        value: The mask value.
        half: The dtype that the inputs are rounded to.
    """
    return compares_in_float32(value) and _is_rounded(value, half)


def _is_rounded(value: Any, half: str) -> bool:
    number = keras.ops.convert_to_numpy(value)
    if half not in HALVES or number.dtype.kind in "biu":
        return False
    wide = number.astype("float32")
    if half == "bfloat16":  # which NumPy does not have: the first half of the bits
        other = (wide.view("uint32") & 0xFFFF) != 0
    else:
        with np.errstate(over="ignore"):
            other = wide.astype("float16") != wide
    return bool(np.any(other & ~np.isnan(wide)))  # NaN is equal to nothing in any dtype


def dropped_share(rate: float, half: str) -> float:
    """Return the share of its inputs that stock Keras drops in half precision.

    Example:

    >>> dropped_share(0.001, "bfloat16")
    0.0078125
    """
    return math.ceil(rate * _UNIFORM[half]) / _UNIFORM[half]


def drops_wrong_share(rate: float, half: str) -> bool:
    """Return whether stock Keras drops, or keeps, another share in half precision than it should.

    Args:
        rate: What it should drop.
        half: The dtype of the inputs.
    """
    if half not in HALVES or not drops_in_own_dtype():
        return False
    return abs(dropped_share(rate, half) - rate) > _SHARE_OFF * min(rate, 1 - rate)


def _is(*classes: type) -> Callable[[Any, Location], bool]:
    return lambda layer, _: isinstance(layer, classes)


def _has_no_kernel(layer: Any, location: Location) -> bool:
    return isinstance(layer, layers_without_kernel(location.half))


def _makes_or_takes_spectra(layer: Any, location: Location) -> bool:
    return isinstance(layer, SPECTRA) or location.spectra


def _is_head(layer: Any, location: Location) -> bool:
    # What a user's layer with layers inside gives back is theirs to say: no rule can reach it.
    own = type(layer).__module__.partition(".")[0] not in {"keras", _PACKAGE}
    return location.final and not (own and children(layer))


def _sums_outputs(layer: Any, _: Location) -> bool:
    if isinstance(layer, layers.ActivityRegularization):
        return not is_kerasmp_layer(layer)
    return getattr(layer, "activity_regularizer", None) is not None


def _is_scores_part(layer: Any, location: Location) -> bool:
    """With a float32 query the scores are float32; keys, values and the output stay as they are."""
    # Torch alone does not multiply a float32 tensor with a float16 one.
    projections = ("query",) if multiplies_mixed() else ("query", "key", "value")
    return isinstance(location.holder, ATTENTION) and (
        isinstance(layer, (layers.Softmax, layers.Dropout)) or layer.name in projections
    )


def _has_large_window(layer: Any, _: Location) -> bool:
    return isinstance(layer, POOLING) and math.prod(layer.pool_size) > LARGEST_WINDOW


def _may_be_masked(layer: Any, location: Location) -> bool:
    return isinstance(layer, layers.GlobalAveragePooling1D) and location.masked is not False


def _interpolates(layer: Any, _: Location) -> bool:
    return isinstance(layer, (layers.UpSampling2D, layers.Resizing)) and (
        layer.interpolation != "nearest"
    )


def _takes_rows(layer: Any, _: Location) -> bool:
    return isinstance(layer, layers.Embedding) and sums_rows_narrowly()


def _steps_through_time(layer: Any, _: Location) -> bool:
    parts = flatten_layers(layer) if isinstance(layer, layers.RNN) else []
    return any(isinstance(part, STEPPING) for part in parts)


def _ends_in_probabilities(layer: Any, _: Location) -> bool:
    return isinstance(layer, WITH_ACTIVATION) and activation_name(layer) in PROBABILITIES


def _is_unsafe_activation(layer: Any, _: Location) -> bool:
    return isinstance(layer, layers.Activation) and activation_name(layer) in UNSAFE_ACTIVATIONS


def _masks_nothing(layer: Any, location: Location) -> bool:
    return isinstance(layer, layers.Masking) and loses_mask_value(layer.mask_value, location.half)


def _rounds_data(layer: Any, location: Location) -> bool:
    # Models with a graph hand their inputs on as they come.
    inside = takers_in(layer) if graph_of(layer) is None else []
    return any(
        not isinstance(each, layers.Masking) or _is_rounded(each.mask_value, location.half)
        for each in (*inside, *location.feeds)
        if each is not layer
    )


def _drops_another_share(layer: Any, location: Location) -> bool:
    return isinstance(layer, layers.Dropout) and drops_wrong_share(layer.rate, location.half)


def _makes_noise(layer: Any, _: Location) -> bool:
    return isinstance(layer, NOISE) and makes_noise_in_own_dtype()


RULES = (
    SafeRule(
        "kernel",
        "22",
        "it fails on this backend: an operation or its gradient has no kernel",
        _has_no_kernel,
        inside=True,
    ),
    SafeRule(
        "spectrum",
        "23",
        "the spectra of loud sound overflow, up to where a layer normalises them",
        _makes_or_takes_spectra,
        ours=True,
        takes=True,
    ),
    SafeRule(
        "head",
        "1, 18",
        "losses, metrics and predictions see the model's outputs, and half precision rounds them",
        _is_head,
        inside=True,
        ours=True,
    ),
    SafeRule(
        "activity",
        "6",
        "the sum over a layer's outputs overflows",
        _sums_outputs,
        ours=True,
    ),
    SafeRule(
        "softmax",
        "3, 14, 18, 19",
        "a softmax in half precision loses small probabilities, and its mask is not low enough",
        _is(layers.Softmax),
    ),
    SafeRule(
        "scores",
        "2, 3",
        "attention's scores overflow, and its softmax rounds",
        _is_scores_part,
    ),
    SafeRule(
        "attention",
        "4, 5, 17",
        "the scores overflow, and sums over them lose small terms",
        _is(layers.Attention, layers.AdditiveAttention),
    ),
    SafeRule(
        "probabilities",
        "1, 15",
        "the gradient of softmax and sigmoid is computed from the rounded probability",
        _ends_in_probabilities,
        ours=True,
    ),
    SafeRule(
        "activation",
        "11, 15",
        "its gradient overflows, or is computed from the rounded output",
        _is_unsafe_activation,
    ),
    SafeRule(
        "normalization",
        "7, 8",
        "statistics and sums of squares overflow or vanish",
        _is(layers.Normalization, layers.UnitNormalization),
    ),
    SafeRule(
        "cosine",
        "8",
        "sums of squares overflow or vanish",
        lambda layer, _: isinstance(layer, layers.Dot) and bool(layer.normalize),
    ),
    SafeRule(
        "pooling",
        "9",
        f"the sum over a window of more than {LARGEST_WINDOW} values loses small terms",
        _has_large_window,
    ),
    SafeRule(
        "masked-pooling",
        "10",
        "the sum over a masked sequence overflows",
        _may_be_masked,
    ),
    SafeRule(
        "average",
        "16",
        "the sum overflows before it is divided",
        _is(layers.Average),
    ),
    SafeRule(
        "spectral",
        "13",
        "the float32 kernel is rounded to half precision by one training step",
        _is(layers.SpectralNormalization),
    ),
    SafeRule(
        "interpolation",
        "20",
        "under TensorFlow's XLA its gradient mixes two dtypes, which is an error",
        _interpolates,
    ),
    SafeRule(
        "embedding",
        "21",
        "the gradient of an id that a batch has many times is summed in half precision",
        _takes_rows,
    ),
    SafeRule(
        "recurrent",
        "12",
        "the gradient of its bias, a sum over batch, steps and positions, gathers roundings",
        _steps_through_time,
        inside=True,
        ours=True,
    ),
    SafeRule(
        "mask-value",
        "24",
        "its mask value is another number in half precision, and masks no step",
        _masks_nothing,
    ),
    SafeRule(
        "data",
        "27",
        "it would round data for a layer inside or after it that needs it as it comes",
        _rounds_data,
        ours=True,
        takes=True,
    ),
    SafeRule(
        "dropout",
        "25",
        "random numbers are so few that another share is dropped than the rate says",
        _drops_another_share,
    ),
    SafeRule(
        "noise",
        "26",
        "random numbers are few, and their mean is not what it should be",
        _makes_noise,
    ),
)
