"""Builds the network of the demo: a small CNN for images of any size."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.layers import BatchNormalization, DenseHead
from kerasmp.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable

_FILTERS = 16  # in the first block; each further block doubles them
_MAX_BLOCKS = 5
_SMALLEST_SIDE = 2  # no further block once the shorter side of the image is this small
# With Keras's default of 0.99, the statistics would not be current after so few steps.
_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Shape, classes and brightness of images.

    Args:
        shape: Height, width and channels.
        classes: The number of classes.
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
    tap: Callable[[], Any] | None = None,
) -> Any:
    """Build the network under the current global policy.

    Blocks of convolution, BatchNormalization, ReLU and pooling halve the image until it is tiny.
    Global pooling and a head with float32 logits follow. Pixels are rescaled in float32.

    Args:
        spec: Shape, classes and brightness of the images.
        model_class: The class of the model.
        batch_size: The number of images in a batch, if it is fixed.
        tap: Returns a layer to insert after each convolution, to capture the gradients there.

    Returns:
        A model, not compiled, from float32 `(batch, *spec.shape)` to float32 `(batch, classes)`.

    Example:

    >>> build_cnn(ImageSpec((8, 8, 1), 10, brightest=16.0)).output_shape
    (None, 10)
    """
    inputs = keras.Input(spec.shape, batch_size=batch_size)
    x = keras.layers.Rescaling(1.0 / spec.brightest, dtype="float32", name="rescale")(inputs)
    side = min(spec.shape[:2])
    for block in range(_MAX_BLOCKS):
        name = f"block{block + 1}"
        x = keras.layers.Conv2D(
            _FILTERS * 2**block, 3, padding="same", use_bias=False, name=f"{name}_conv"
        )(x)
        if tap is not None:
            x = tap()(x)
        x = BatchNormalization(momentum=_MOMENTUM, name=f"{name}_norm")(x)
        x = keras.layers.Activation("relu", name=f"{name}_relu")(x)
        x = keras.layers.MaxPooling2D(2, padding="same", name=f"{name}_pool")(x)
        side = math.ceil(side / 2)
        if side <= _SMALLEST_SIDE:
            break
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = DenseHead(spec.classes, name="logits")(x)
    return model_class(inputs, outputs, name="demo_cnn")


def activation_bytes(model: Any, batch_size: int) -> int:
    """Return the total size of all layer outputs for one batch.

    It is computed from shapes and dtypes, not measured: the memory that a framework really takes
    depends on how it fuses operations and reuses buffers.

    Args:
        model: A functional model.
        batch_size: The number of images in a batch.
    """
    return batch_size * sum(
        _bytes(layer.output.shape[1:], layer.output.dtype)
        for layer in model.layers
        if not isinstance(layer, keras.layers.InputLayer)
    )


def weight_bytes(model: Any) -> int:
    """Return the total size of a model's variables."""
    return sum(_bytes(variable.shape, variable.dtype) for variable in model.variables)


def _bytes(shape: Any, dtype: str) -> int:
    return int(math.prod(shape)) * (2 if dtype in {"float16", "bfloat16"} else 4)
