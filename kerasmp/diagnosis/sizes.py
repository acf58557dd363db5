"""Finds sizes that are not multiples of 8, with which Tensor Cores are slower: hints only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.policy.locations import final_layers, paths
from kerasmp.policy.safe import ATTENTION
from kerasmp.policy.spec import HALVES
from kerasmp.probe.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

MULTIPLE = 8

_MATMUL_LAYERS = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_RECURRENT_CELLS = (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell)
_MATRIX_AXES = 2  # the kernels inside attention have more
# The channels of an image and the number of classes are given. Padding pays off above these sizes.
_STEM_CHANNELS = 4
_LARGE_HEAD = 128


def findings(model: Any) -> Iterator[Finding]:
    """Yield a hint for each half-precision layer whose matmul sizes are not multiples of 8.

    Args:
        model: A Keras model.
    """
    heads = {id(layer) for layer in final_layers(model)}
    for layer, path in paths(model):
        if layer.compute_dtype not in HALVES:
            continue
        misaligned = [
            f"{what} {size}"
            for what, size in _sizes(layer, is_head=id(layer) in heads)
            if size % MULTIPLE
        ]
        if misaligned:
            yield Finding(
                "hint",
                path,
                "sizes",
                f"{' and '.join(misaligned)}: Tensor Cores are fastest with multiples of "
                f"{MULTIPLE}.",
                "Round it up.",
            )


def _sizes(layer: Any, *, is_head: bool) -> Iterator[tuple[str, int]]:
    if isinstance(layer, ATTENTION):
        key = layer.key_dim if isinstance(layer, ATTENTION[0]) else layer.head_dim
        yield "head size", key
    if isinstance(layer, _RECURRENT_CELLS) and layer.built:
        yield "input size", layer.kernel.shape[0]
        yield "units", layer.units
    einsum = isinstance(layer, keras.layers.EinsumDense) and layer.built
    if einsum and len(layer.kernel.shape) == _MATRIX_AXES:
        yield from (("kernel size", size) for size in layer.kernel.shape)
    depthwise = getattr(layer, "groups", 1) > 1
    if not isinstance(layer, _MATMUL_LAYERS) or not layer.built or depthwise:
        return
    transposed = "Transpose" in type(layer).__name__
    inputs, units = layer.kernel.shape[-2:][:: -1 if transposed else 1]
    if isinstance(layer, keras.layers.Dense) or inputs > _STEM_CHANNELS:
        yield "input size", inputs
    if not is_head or units >= _LARGE_HEAD:
        yield "output size", units


def batch_size(model: Any, arrays: list[Any]) -> Iterator[Finding]:
    """Yield a hint if the batch size is not a multiple of 8.

    Args:
        model: A Keras model.
        arrays: The arrays of a batch.
    """
    size = min(len(array) for array in arrays)
    if size % MULTIPLE and any(layer.compute_dtype in HALVES for layer in flatten_layers(model)):
        yield Finding(
            "hint",
            model.name,
            "sizes",
            f"batch size {size}: Tensor Cores are fastest with multiples of {MULTIPLE}.",
            "Round it up.",
        )
