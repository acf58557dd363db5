"""The demo's network: a small CNN for images of any size, in whatever policy is in force."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.layers import BatchNormalization, DenseHead
from kerasmp.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable

_FILTERS = 16  # of the first block; each further one has twice as many
_SMALLEST = 2  # blocks are added while the map is larger than this
_MOST_BLOCKS = 5
# Keras's default of 0.99 would need more steps than the demo has until the statistics are current.
_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What a network must know about its images.

    Args:
        shape: Height, width and channels.
        classes: Number of classes.
        brightest: The pixel value that becomes 1.
    """

    shape: tuple[int, int, int]
    classes: int
    brightest: float


def build_cnn(
    spec: ImageSpec,
    *,
    model_class: Any = Model,
    batch_size: int | None = None,
    tap: Callable[[str], Any] | None = None,
) -> Any:
    """Build the network under the current global policy.

    Blocks of convolution, BatchNormalization, ReLU and pooling halve the image until it is tiny,
    then global pooling and a head that gives float32 logits. Pixels are rescaled in float32.

    Args:
        spec: What the images are like.
        model_class: The class of the model.
        batch_size: Images a batch, if it is to be fixed.
        tap: Given the name of a block, returns a layer to put behind its convolution, for a look
            at the gradients there.

    Returns:
        The model, not compiled: float32 `(batch, *spec.shape)` to float32 `(batch, classes)`.

    Example:

    >>> build_cnn(ImageSpec((8, 8, 1), 10, brightest=16.0)).output_shape
    (None, 10)
    """
    inputs = keras.Input(spec.shape, batch_size=batch_size)
    x = keras.layers.Rescaling(1.0 / spec.brightest, dtype="float32", name="rescale")(inputs)
    for block in range(_blocks(spec.shape)):
        name = f"block{block + 1}"
        x = keras.layers.Conv2D(
            _FILTERS * 2**block, 3, padding="same", use_bias=False, name=f"{name}_conv"
        )(x)
        if tap is not None:
            x = tap(name)(x)
        x = BatchNormalization(momentum=_MOMENTUM, name=f"{name}_norm")(x)
        x = keras.layers.Activation("relu", name=f"{name}_relu")(x)
        x = keras.layers.MaxPooling2D(2, padding="same", name=f"{name}_pool")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = DenseHead(spec.classes, name="logits")(x)
    return model_class(inputs, outputs, name="demo_cnn")


def _blocks(shape: tuple[int, int, int]) -> int:
    side, blocks = min(shape[:2]), 1
    while blocks < _MOST_BLOCKS and side > _SMALLEST * 2:
        side = -(-side // 2)
        blocks += 1
    return blocks


def activation_bytes(model: Any, batch_size: int) -> int:
    """Return what the outputs of all layers take for one batch, in the dtypes they have.

    This is computed from shapes and dtypes, not measured: what a framework really keeps depends on
    its own fusion and reuse.

    Args:
        model: A functional model.
        batch_size: Images a batch.
    """
    return sum(
        batch_size * _size(layer.output.shape[1:]) * _itemsize(layer.output.dtype)
        for layer in model.layers
        if not isinstance(layer, keras.layers.InputLayer)
    )


def weight_bytes(model: Any) -> int:
    """Return what the model's variables take; under the mixed policies all are float32."""
    return sum(_size(variable.shape) * _itemsize(variable.dtype) for variable in model.variables)


def _size(shape: Any) -> int:
    size = 1
    for side in shape:
        size *= int(side)
    return size


def _itemsize(dtype: str) -> int:
    return {"float16": 2, "bfloat16": 2, "float64": 8}.get(str(dtype), 4)
