"""Sizes that Tensor Cores do not like: hints only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.diagnosis.finding import Finding
from kerasmp.policy.locations import final_layers
from kerasmp.policy.safe import ATTENTION
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterator

MULTIPLE = 8

_PRODUCTS = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_RECURRENT = (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell)
_MATRIX = 2  # axes; the kernels inside of attention have more
# A stem takes what an image has, and a classifier what classes there are; padding pays from here.
_STEM_CHANNELS = 4
_LARGE_HEAD = 128


def findings(model: Any) -> Iterator[Finding]:
    """Yield a hint for each layer with half precision products of sizes that miss multiples of 8.

    Args:
        model: A Keras model.
    """
    heads = {id(layer) for layer in final_layers(model)}
    for layer in flatten_layers(model):
        if layer.compute_dtype not in HALVES:
            continue
        odd = [
            f"{what} {size}"
            for what, size in _sizes(layer, is_head=id(layer) in heads)
            if size % MULTIPLE
        ]
        if odd:
            yield Finding(
                "hint",
                layer.path or layer.name,
                "sizes",
                f"{' and '.join(odd)}: Tensor Cores want multiples of {MULTIPLE}.",
                "Round up.",
            )


def _sizes(layer: Any, *, is_head: bool) -> Iterator[tuple[str, int]]:
    if isinstance(layer, ATTENTION):
        key = layer.key_dim if isinstance(layer, ATTENTION[0]) else layer.head_dim
        yield "head size", key
    if isinstance(layer, _RECURRENT) and layer.built:
        yield "input size", layer.kernel.shape[0]
        yield "units", layer.units
    einsum = isinstance(layer, keras.layers.EinsumDense) and layer.built
    if einsum and len(layer.kernel.shape) == _MATRIX:
        yield from (("kernel size", size) for size in layer.kernel.shape)
    depthwise = getattr(layer, "groups", 1) > 1
    if not isinstance(layer, _PRODUCTS) or not layer.built or depthwise:
        return
    transposed = "Transpose" in type(layer).__name__
    inputs, units = layer.kernel.shape[-2:][:: -1 if transposed else 1]
    if isinstance(layer, keras.layers.Dense) or inputs > _STEM_CHANNELS:
        yield "input size", inputs
    if not is_head or units >= _LARGE_HEAD:
        yield "output size", units
