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
from kerasmp.layers.twin import twin

_PROSE = """
    The gradient of the bias, a sum over all positions, is summed in float32; in stock Keras in the
    compute dtype on JAX, and in bfloat16 on TensorFlow. On TensorFlow without a GPU the convolution
    runs in float32 under "mixed_float16", and without oneDNN under "mixed_bfloat16" too, since
    those kernels for the CPU lose accuracy in the gradients, and time.
"""


def _over(axes: str, given: str, made: str, *, filters: bool = True) -> dict[str, str]:
    """Return what the docstring says of a convolution over such axes, with shapes as an example."""
    channels = "filters" if filters else "channels * depth_multiplier"
    numbers = "2, 3" if filters else "3"
    return {
        "prose": _PROSE,
        **({"filters": "Number of channels of the output."} if filters else {}),
        "kernel_size": "Length of the window, or one for each axis.",
        "inputs": f"`(batch, {axes}, channels)`, or as `data_format` says",
        "outputs": f"`(batch, new_{axes.replace(', ', ', new_')}, {channels})`",
        "example": f'>>> layer = {{name}}({numbers}, dtype="mixed_float16")\n'
        f">>> layer(keras.ops.ones({given})).shape == {made}\n"
        "True",
    }


@twin(**_over("steps", "(1, 6, 1)", "(1, 4, 2)"))
class Conv1D(WideConvolution, keras.layers.Conv1D):
    """`keras.layers.Conv1D` whose gradients are summed in float32."""

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """Convolve, also with "causal" padding, for which Keras has a `call` of its own here."""
        if self.padding != "causal":
            return super().convolution_op(inputs, kernel)
        before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
        padding = [[0, 0], [0, 0], [0, 0]]
        padding[1 if self.data_format == "channels_last" else 2][0] = before
        inputs = ops.pad(inputs, padding)
        return ops.conv(inputs, kernel, **{**self._settings(), "padding": "valid"})


@twin(**_over("rows, columns", "(1, 6, 6, 1)", "(1, 4, 4, 2)"))
class Conv2D(WideConvolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose gradients are summed in float32."""


@twin(**_over("planes, rows, columns", "(1, 4, 4, 4, 1)", "(1, 2, 2, 2, 2)"))
class Conv3D(WideConvolution, keras.layers.Conv3D):
    """`keras.layers.Conv3D` whose gradients are summed in float32."""


@twin(**_over("steps", "(1, 6, 1)", "(1, 8, 2)"))
class Conv1DTranspose(WideTransposedConvolution, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` whose gradients are summed in float32."""


@twin(**_over("rows, columns", "(1, 6, 6, 1)", "(1, 8, 8, 2)"))
class Conv2DTranspose(WideTransposedConvolution, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` whose gradients are summed in float32."""


@twin(**_over("planes, rows, columns", "(1, 2, 2, 2, 1)", "(1, 4, 4, 4, 2)"))
class Conv3DTranspose(WideTransposedConvolution, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` whose gradients are summed in float32."""


@twin(**_over("steps", "(1, 6, 2)", "(1, 4, 2)", filters=False))
class DepthwiseConv1D(WideDepthwiseConvolution, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` whose gradients are summed in float32."""


@twin(**_over("rows, columns", "(1, 6, 6, 2)", "(1, 4, 4, 2)", filters=False))
class DepthwiseConv2D(WideDepthwiseConvolution, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` whose gradients are summed in float32."""


@twin(**_over("steps", "(1, 6, 2)", "(1, 4, 2)"))
class SeparableConv1D(WideSeparableConvolution, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` whose gradients are summed in float32."""


@twin(**_over("rows, columns", "(1, 6, 6, 2)", "(1, 4, 4, 2)"))
class SeparableConv2D(WideSeparableConvolution, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` whose gradients are summed in float32."""
