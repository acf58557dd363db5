"""Dense layers and convolutions whose bias gradient is summed in float32.

The gradient of a bias is a sum over the batch and all positions.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.backend.keras_internals import AutocastScope
from kerasmp.layers.base import Quantizable, drop_in


class Float32BiasGradient(keras.layers.Layer):
    """Adds the bias in such a way that its gradient is summed in float32."""

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Add a weight, without autocast if it is a bias whose gradient Keras would sum in half."""
        if kwargs.get("name") == "bias" and current().SUMS_IN_COMPUTE_DTYPE:
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)

    def _activate(self, outputs: Any, dtype: str) -> Any:
        """Cast the outputs to `dtype` and apply the activation to the result.

        In float32, the activation would keep float32 tensors for the backward pass. Keras's `call`
        applies it before a cast could follow, and removing it for the length of that call would not
        be thread-safe.
        """
        outputs = ops.cast(outputs, dtype)
        return outputs if self.activation is None else self.activation(outputs)

    def _output_dtype(self, inputs: Any) -> str:
        """Return the dtype of the outputs.

        Keras has cast the inputs to the compute dtype. TimeDistributed, however, casts them to its
        own compute dtype, expects outputs of that dtype, and calls `call` directly.
        """
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        return dtype if keras.backend.is_float_dtype(dtype) else str(self.compute_dtype)


class _MatrixProduct(Quantizable, Float32BiasGradient):
    def call(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: FBT001 - Keras's signature
        """Compute `activation(inputs @ kernel + bias)`."""
        dtype = self._output_dtype(inputs)
        if self.quantization_mode is not None:
            # TimeDistributed calls this directly, where Keras would use the int8 kernel as floats.
            return ops.cast(self.quantized_call(inputs, training=training), dtype)
        outputs = self._multiply(inputs)
        if self.bias is not None:
            outputs = current().add_bias(outputs, self.bias)
        return self._activate(outputs, dtype)

    def _multiply(self, inputs: Any) -> Any:
        raise NotImplementedError

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the same under a quantized policy."""
        # Keras applies the activation before the cast.
        return ops.cast(super().quantized_call(*args, **kwargs), self.compute_dtype)


@drop_in(
    units="The size of the last axis of the output.",
    inputs="`(batch, ..., features)`",
    outputs="`(batch, ..., units)`",
)
class Dense(_MatrixProduct, keras.layers.Dense):
    """`keras.layers.Dense` whose bias gradient is summed in float32.

    Stock Keras sums it over all rows and positions in the compute dtype on JAX, and in bfloat16
    under "mixed_bfloat16" on TensorFlow, where 4,096 ones add up to 256. On torch this layer
    computes the same as the stock one. For the last layer of a model, see
    `kerasmp.layers.DenseHead`.

    Example:

    >>> layer = Dense(2, activation="relu", dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 3))).shape == (1, 2)
    True
    """

    def _multiply(self, inputs: Any) -> Any:
        return ops.matmul(inputs, self.kernel)


@drop_in(
    equation="The einsum equation of the inputs and the kernel.",
    output_shape="The shape of the output without the batch axis.",
    inputs="As given by `equation`",
    outputs="As given by `equation`",
)
class EinsumDense(_MatrixProduct, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` whose bias gradient is summed in float32.

    Stock Keras sums it over all rows and positions in the compute dtype on JAX. On TensorFlow it
    sums in bfloat16 under "mixed_bfloat16", and also in float16 if the bias has several axes or is
    not along the last one. On torch this layer computes the same as the stock one.

    Example:

    >>> layer = EinsumDense("abc,cd->abd", (None, 2), bias_axes="d", dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 3))).shape == (1, 4, 2)
    True
    """

    def _multiply(self, inputs: Any) -> Any:
        return ops.einsum(self.equation, inputs, self.kernel)


class _Convolution(Float32BiasGradient):
    """A mixin that computes in float32 where float16 has no good kernels."""

    def call(self, inputs: Any) -> Any:
        """Convolve the inputs, add the bias and apply the activation."""
        output_dtype = self._output_dtype(inputs)
        dtype = current().convolution_dtype(output_dtype)
        # With LoRA, Keras returns the kernel in the compute dtype, even within an autocast scope.
        if dtype == output_dtype or getattr(self, "lora_enabled", False):
            outputs = self._convolve_and_add_bias(inputs)
        else:
            with AutocastScope(dtype):
                outputs = self._convolve_and_add_bias(ops.cast(inputs, dtype))
        return self._activate(outputs, output_dtype)

    def _convolve_and_add_bias(self, inputs: Any) -> Any:
        outputs = self._convolve(inputs)
        if self.bias is None:
            return outputs
        shape = [1] * len(outputs.shape)
        shape[-1 if self.data_format == "channels_last" else 1] = -1
        return current().add_bias(outputs, ops.reshape(self.bias, shape))

    def _convolve(self, inputs: Any) -> Any:
        return self.convolution_op(inputs, self.kernel)

    def _settings(self) -> dict[str, Any]:
        """Return the keyword arguments that all convolutions of `keras.ops` have in common."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "data_format": self.data_format,
        }


class _TransposedConvolution(_Convolution):
    def _convolve(self, inputs: Any) -> Any:
        return ops.conv_transpose(
            inputs, self.kernel, output_padding=self.output_padding, **self._settings()
        )


class _DepthwiseConvolution(_Convolution):
    def _convolve(self, inputs: Any) -> Any:
        return ops.depthwise_conv(inputs, self.kernel, **self._settings())


class _SeparableConvolution(_Convolution):
    def _convolve(self, inputs: Any) -> Any:
        return ops.separable_conv(
            inputs, self.depthwise_kernel, self.pointwise_kernel, **self._settings()
        )


_PROSE = """
    Stock Keras sums it over all positions in the compute dtype on JAX, and in bfloat16 under
    "mixed_bfloat16" on TensorFlow. On TensorFlow without a GPU, the convolution is computed in
    float32 under "mixed_float16", and without oneDNN also under "mixed_bfloat16", because those CPU
    kernels are slow and have inaccurate gradients.
"""


def _convolution(axes: str, given: str, made: str, *, filters: bool = True) -> dict[str, Any]:
    """Return the table for a convolution over some axes.

    Args:
        axes: The names of the spatial axes.
        given: The input shape in the example.
        made: The output shape in the example.
        filters: Whether the layer has an argument `filters`.
    """
    channels = "filters" if filters else "channels * depth_multiplier"
    numbers = "2, 3" if filters else "3"
    return {
        "prose": _PROSE,
        **({"filters": "The number of output channels."} if filters else {}),
        "kernel_size": "The size of the window, an integer or one for each axis.",
        "inputs": f"`(batch, {axes}, channels)`, or as given by `data_format`",
        "outputs": f"`(batch, new_{axes.replace(', ', ', new_')}, {channels})`",
        "example": f'>>> layer = {{name}}({numbers}, dtype="mixed_float16")\n'
        f">>> layer(keras.ops.ones({given})).shape == {made}\n"
        "True",
    }


@drop_in(**_convolution("steps", "(1, 6, 1)", "(1, 4, 2)"))
class Conv1D(_Convolution, keras.layers.Conv1D):
    """`keras.layers.Conv1D` whose bias gradient is summed in float32."""

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """Convolve, also with "causal" padding, which Keras adds in its own `call`."""
        if self.padding != "causal":
            return super().convolution_op(inputs, kernel)
        before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
        padding = [[0, 0], [0, 0], [0, 0]]
        padding[1 if self.data_format == "channels_last" else 2][0] = before
        inputs = ops.pad(inputs, padding)
        return ops.conv(inputs, kernel, **{**self._settings(), "padding": "valid"})


@drop_in(**_convolution("rows, columns", "(1, 6, 6, 1)", "(1, 4, 4, 2)"))
class Conv2D(_Convolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose bias gradient is summed in float32."""


@drop_in(**_convolution("planes, rows, columns", "(1, 4, 4, 4, 1)", "(1, 2, 2, 2, 2)"))
class Conv3D(_Convolution, keras.layers.Conv3D):
    """`keras.layers.Conv3D` whose bias gradient is summed in float32."""


@drop_in(**_convolution("steps", "(1, 6, 1)", "(1, 8, 2)"))
class Conv1DTranspose(_TransposedConvolution, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` whose bias gradient is summed in float32."""


@drop_in(**_convolution("rows, columns", "(1, 6, 6, 1)", "(1, 8, 8, 2)"))
class Conv2DTranspose(_TransposedConvolution, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` whose bias gradient is summed in float32."""


@drop_in(**_convolution("planes, rows, columns", "(1, 2, 2, 2, 1)", "(1, 4, 4, 4, 2)"))
class Conv3DTranspose(_TransposedConvolution, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` whose bias gradient is summed in float32."""


@drop_in(**_convolution("steps", "(1, 6, 2)", "(1, 4, 2)", filters=False))
class DepthwiseConv1D(_DepthwiseConvolution, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` whose bias gradient is summed in float32."""


@drop_in(**_convolution("rows, columns", "(1, 6, 6, 2)", "(1, 4, 4, 2)", filters=False))
class DepthwiseConv2D(_DepthwiseConvolution, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` whose bias gradient is summed in float32."""


@drop_in(**_convolution("steps", "(1, 6, 2)", "(1, 4, 2)"))
class SeparableConv1D(_SeparableConvolution, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` whose bias gradient is summed in float32."""


@drop_in(**_convolution("rows, columns", "(1, 6, 6, 2)", "(1, 4, 4, 2)"))
class SeparableConv2D(_SeparableConvolution, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` whose bias gradient is summed in float32."""
