"""Merging layers that overflow in float16, mended."""

from __future__ import annotations

from typing import Any

import keras

from kerasmp.layers.in_float32 import CallInFloat32
from kerasmp.layers.twin import twin
from kerasmp.ops import in_float32, normalize


@twin(
    inputs="A list of tensors that broadcast",
    outputs="What the inputs broadcast to",
    raises="If the input is no list.",
)
class Average(CallInFloat32, keras.layers.Average):
    """`keras.layers.Average`, summed in float32 between tensors of the compute dtype.

    Example:

    >>> x = keras.ops.array([[40000.0]])
    >>> float(Average(dtype="mixed_float16")([x, x])[0, 0])  # their sum is inf in float16
    40000.0
    """


@twin(
    axes="Axis, or an axis for each input, of the vectors.",
    normalize="Whether to make the vectors of length 1 first; default False.",
    inputs="A list of two tensors, as long as each other along `axes`",
    outputs="`(batch, ...)`: what the first has besides `axes`, then what the second has, or "
    "`(batch, 1)` for two matrices",
    raises="If they are not as long as each other.",
)
class Dot(keras.layers.Dot):
    """`keras.layers.Dot` that normalizes, and multiplies what it normalized, in float32.

    Vectors longer than 256 do not overflow, and the product with a zero vector is 0, and so is its
    gradient. Without `normalize` it is that of Keras, and multiplies in the compute dtype.

    Example:

    >>> x = keras.ops.array([[300.0, 400.0], [0.0, 0.0]])
    >>> y = Dot(axes=1, normalize=True, dtype="mixed_float16")([x, x])
    >>> keras.ops.convert_to_numpy(y).round(2).tolist()
    [[1.0], [0.0]]
    """

    def call(self, inputs: Any) -> Any:
        """Return the products."""
        if not self.normalize:
            return super().call(inputs)
        return in_float32(self._cosine)(inputs)

    def _cosine(self, inputs: Any) -> Any:
        axes = [self.axes] * 2 if isinstance(self.axes, int) else self.axes
        units = [normalize(x, axis=axis) for x, axis in zip(inputs, axes, strict=True)]
        # The name keeps Keras from counting this one among the layers it has to name.
        return keras.layers.Dot(self.axes, name=self.name).call(units)
