"""Convolutions whose bias gradient, a sum over all positions, is summed in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.layers.bias import (
    WideConvolution,
    WideDepthwiseConvolution,
    WideSeparableConvolution,
    WideTransposedConvolution,
)


@keras.saving.register_keras_serializable(package="kerasmp")
class Conv1D(WideConvolution, keras.layers.Conv1D):
    """`keras.layers.Conv1D` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        filters: Number of channels of the output.
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.Conv1D`.

    Input shape:
        `(batch, steps, channels)`, any float dtype; with `data_format="channels_first"`
        the channels come second.

    Output shape:
        `(batch, new_steps, filters)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = Conv1D(2, 3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 6, 1))).shape == (1, 4, 2)
    True
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """Convolve, also with "causal" padding, for which Keras has a `call` of its own here."""
        if self.padding != "causal":
            return super().convolution_op(inputs, kernel)
        before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
        padding = [[0, 0], [0, 0], [0, 0]]
        padding[1 if self.data_format == "channels_last" else 2][0] = before
        inputs = ops.pad(inputs, padding)
        return ops.conv(inputs, kernel, **{**self._settings(), "padding": "valid"})


@keras.saving.register_keras_serializable(package="kerasmp")
class Conv2D(WideConvolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        filters: Number of channels of the output.
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.Conv2D`.

    Input shape:
        `(batch, rows, columns, channels)`, any float dtype; with `data_format="channels_first"`
        the channels come second.

    Output shape:
        `(batch, new_rows, new_columns, filters)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = Conv2D(2, 3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 6, 6, 1))).shape == (1, 4, 4, 2)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class Conv3D(WideConvolution, keras.layers.Conv3D):
    """`keras.layers.Conv3D` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        filters: Number of channels of the output.
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.Conv3D`.

    Input shape:
        `(batch, planes, rows, columns, channels)`, any float dtype; with
        `data_format="channels_first"` the channels come second.

    Output shape:
        `(batch, new_planes, new_rows, new_columns, filters)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = Conv3D(2, 3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 4, 4, 1))).shape == (1, 2, 2, 2, 2)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class Conv1DTranspose(WideTransposedConvolution, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        filters: Number of channels of the output.
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.Conv1DTranspose`.

    Input shape:
        `(batch, steps, channels)`, any float dtype; with `data_format="channels_first"`
        the channels come second.

    Output shape:
        `(batch, new_steps, filters)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = Conv1DTranspose(2, 3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 6, 1))).shape == (1, 8, 2)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class Conv2DTranspose(WideTransposedConvolution, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        filters: Number of channels of the output.
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.Conv2DTranspose`.

    Input shape:
        `(batch, rows, columns, channels)`, any float dtype; with `data_format="channels_first"`
        the channels come second.

    Output shape:
        `(batch, new_rows, new_columns, filters)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = Conv2DTranspose(2, 3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 6, 6, 1))).shape == (1, 8, 8, 2)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class Conv3DTranspose(WideTransposedConvolution, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        filters: Number of channels of the output.
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.Conv3DTranspose`.

    Input shape:
        `(batch, planes, rows, columns, channels)`, any float dtype; with
        `data_format="channels_first"` the channels come second.

    Output shape:
        `(batch, new_planes, new_rows, new_columns, filters)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = Conv3DTranspose(2, 3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 2, 2, 2, 1))).shape == (1, 4, 4, 4, 2)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class DepthwiseConv1D(WideDepthwiseConvolution, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.DepthwiseConv1D`.

    Input shape:
        `(batch, steps, channels)`, any float dtype; with `data_format="channels_first"`
        the channels come second.

    Output shape:
        `(batch, new_steps, channels * depth_multiplier)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = DepthwiseConv1D(3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 6, 2))).shape == (1, 4, 2)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class DepthwiseConv2D(WideDepthwiseConvolution, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.DepthwiseConv2D`.

    Input shape:
        `(batch, rows, columns, channels)`, any float dtype; with `data_format="channels_first"`
        the channels come second.

    Output shape:
        `(batch, new_rows, new_columns, channels * depth_multiplier)`, in the policy's compute
        dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = DepthwiseConv2D(3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 6, 6, 2))).shape == (1, 4, 4, 2)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class SeparableConv1D(WideSeparableConvolution, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        filters: Number of channels of the output.
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.SeparableConv1D`.

    Input shape:
        `(batch, steps, channels)`, any float dtype; with `data_format="channels_first"`
        the channels come second.

    Output shape:
        `(batch, new_steps, filters)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = SeparableConv1D(2, 3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 6, 2))).shape == (1, 4, 2)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class SeparableConv2D(WideSeparableConvolution, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` whose gradients are summed in float32.

    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. Under "mixed_float16" on TensorFlow without
    a GPU the convolution runs in float32, since float16 kernels for the CPU lose accuracy in the
    gradients, and time.

    Args:
        filters: Number of channels of the output.
        kernel_size: Length of the window, or one for each axis.
        **kwargs: As for `keras.layers.SeparableConv2D`.

    Input shape:
        `(batch, rows, columns, channels)`, any float dtype; with `data_format="channels_first"`
        the channels come second.

    Output shape:
        `(batch, new_rows, new_columns, filters)`, in the policy's compute dtype.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740,
        section 3.3 (what arithmetic float16 may do).

    Example:

    >>> layer = SeparableConv2D(2, 3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 6, 6, 2))).shape == (1, 4, 4, 2)
    True
    """
