"""Average pooling that sums in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.layers.in_float32 import CallInFloat32
from kerasmp.ops import in_float32


@keras.saving.register_keras_serializable(package="kerasmp")
class AveragePooling1D(CallInFloat32, keras.layers.AveragePooling1D):
    """`keras.layers.AveragePooling1D`, summed in float32 between tensors of the compute dtype.

    Args:
        pool_size: Length of the window.
        **kwargs: As for Keras: `strides`, `padding`, `data_format`, `dtype`, `name`.

    Input shape:
        `(batch, steps, channels)`, or as `data_format` says, any float dtype.

    Output shape:
        `(batch, new_steps, channels)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = AveragePooling1D(2048, dtype="mixed_float16")
    >>> float(layer(keras.ops.full((1, 2048, 1), 100.0))[0, 0, 0])  # the sum is above 65504
    100.0
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class AveragePooling2D(CallInFloat32, keras.layers.AveragePooling2D):
    """`keras.layers.AveragePooling2D`, summed in float32 between tensors of the compute dtype.

    Args:
        pool_size: Size of the window, an int or two.
        **kwargs: As for Keras: `strides`, `padding`, `data_format`, `dtype`, `name`.

    Input shape:
        `(batch, rows, columns, channels)`, or as `data_format` says, any float dtype.

    Output shape:
        `(batch, new_rows, new_columns, channels)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = AveragePooling2D(112, dtype="mixed_float16")
    >>> float(layer(keras.ops.full((1, 112, 112, 1), 10.0))[0, 0, 0, 0])
    10.0
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class AveragePooling3D(CallInFloat32, keras.layers.AveragePooling3D):
    """`keras.layers.AveragePooling3D`, summed in float32 between tensors of the compute dtype.

    Args:
        pool_size: Size of the window, an int or three.
        **kwargs: As for Keras: `strides`, `padding`, `data_format`, `dtype`, `name`.

    Input shape:
        `(batch, depth, rows, columns, channels)`, or as `data_format` says, any float dtype.

    Output shape:
        `(batch, new_depth, new_rows, new_columns, channels)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = AveragePooling3D(20, dtype="mixed_float16")
    >>> float(layer(keras.ops.full((1, 20, 20, 20, 1), 10.0))[0, 0, 0, 0, 0])
    10.0
    """


@keras.saving.register_keras_serializable(package="kerasmp")
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

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

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
