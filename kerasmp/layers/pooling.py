"""Average pooling that sums in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.layers.in_float32 import CallInFloat32
from kerasmp.layers.twin import twin
from kerasmp.ops import in_float32
from kerasmp.ops.precision import registered


def _over(axes: str, given: str, size: int) -> dict[str, str]:
    """Return what the docstring says of pooling over such axes; an input's shape is an example."""
    return {
        "pool_size": "Size of the window, an int or one for each axis.",
        "inputs": f"`(batch, {axes}, channels)`, or as `data_format` says",
        "outputs": f"`(batch, new_{axes.replace(', ', ', new_')}, channels)`",
        "example": f'>>> layer = {{name}}({size}, dtype="mixed_float16")\n'
        f">>> x = keras.ops.full({given}, 100.0)  # their sum is above 65504\n"
        ">>> float(keras.ops.max(layer(x)))\n"
        "100.0",
    }


@twin(**_over("steps", "(1, 2048, 1)", 2048))
class AveragePooling1D(CallInFloat32, keras.layers.AveragePooling1D):
    """`keras.layers.AveragePooling1D`, summed in float32 between tensors of the compute dtype."""


@twin(**_over("rows, columns", "(1, 30, 30, 1)", 30))
class AveragePooling2D(CallInFloat32, keras.layers.AveragePooling2D):
    """`keras.layers.AveragePooling2D`, summed in float32 between tensors of the compute dtype."""


@twin(**_over("depth, rows, columns", "(1, 10, 10, 10, 1)", 10))
class AveragePooling3D(CallInFloat32, keras.layers.AveragePooling3D):
    """`keras.layers.AveragePooling3D`, summed in float32 between tensors of the compute dtype."""


@registered
class GlobalAveragePooling1D(keras.layers.GlobalAveragePooling1D):
    """`keras.layers.GlobalAveragePooling1D`, summed in float32; what is masked in full gives 0.

    With a mask, Keras sums in float16, which overflows, and divides 0 by 0 where a sequence has
    no step left.

    Args:
        **kwargs: As for Keras: `data_format`, `keepdims`, `dtype`, `name`.

    Call arguments:
        inputs: `(batch, steps, channels)`, or as `data_format` says, any float dtype.
        mask: `(batch, steps)`, true where a step counts; default None.

    Output shape:
        `(batch, channels)`, or `(batch, 1, channels)` with `keepdims=True`, in the policy's compute
        dtype.

    Example:

    >>> layer = GlobalAveragePooling1D(dtype="mixed_float16")
    >>> mask = keras.ops.array([[True, True], [False, False]])
    >>> keras.ops.convert_to_numpy(layer(keras.ops.full((2, 2, 1), 40000.0), mask=mask)).tolist()
    [[40000.0], [0.0]]
    """

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Return the average over the steps that count."""
        average = in_float32(super().call)
        if mask is None:
            return average(inputs)
        mask = ops.cast(mask, "bool")
        nothing = ops.logical_not(ops.any(mask, axis=1, keepdims=True))
        # Nothing is averaged over everything, so that no 0/0 comes up, also on the way back.
        outputs = average(inputs, mask=ops.logical_or(mask, nothing))
        if self.keepdims:
            nothing = ops.expand_dims(nothing, 1)
        return ops.where(nothing, 0, outputs)
