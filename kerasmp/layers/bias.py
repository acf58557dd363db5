"""What layers with a bias share: its gradient, a sum over all positions, is summed in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.backend.keras_internals import AutocastScope
from kerasmp.layers.quantizing import QuantizesAsStock


class WideBias(keras.layers.Layer):
    """Adds the bias so that its gradient is summed in float32, whatever the compute dtype."""

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Add a weight; the bias is not cast where its gradient would then be summed in half."""
        if kwargs.get("name") == "bias" and current().SUMS_IN_COMPUTE_DTYPE:
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)

    def _activated(self, outputs: Any, dtype: str) -> Any:
        """Cast to `dtype`, and activate that.

        An activation in float32 would keep float32 tensors for the backward pass. It comes after
        the cast here, and not within Keras's `call` for which it would have to be taken away: other
        threads may call the layer.
        """
        outputs = ops.cast(outputs, dtype)
        return outputs if self.activation is None else self.activation(outputs)

    def _dtype_of(self, inputs: Any) -> str:
        """Return the dtype of the outputs.

        Keras casts inputs to the compute dtype. But TimeDistributed casts them to its own, in which
        its outputs are to be, and then calls `call` itself.
        """
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        return dtype if keras.backend.is_float_dtype(dtype) else str(self.compute_dtype)


class WideConvolution(WideBias):
    """The same for convolutions, which compute in float32 where float16 has no good kernels."""

    def call(self, inputs: Any) -> Any:
        """Convolve `inputs`; see the class in Keras."""
        given = self._dtype_of(inputs)
        dtype = current().convolution_dtype(given)
        # LoRA gives a kernel in the compute dtype, whatever is asked for.
        if dtype == given or getattr(self, "lora_enabled", False):
            return self._activated(self._with_bias(inputs), given)
        with AutocastScope(dtype):
            outputs = self._with_bias(ops.cast(inputs, dtype))
        return self._activated(outputs, given)

    def _with_bias(self, inputs: Any) -> Any:
        outputs = self._convolved(inputs)
        if self.bias is None:
            return outputs
        shape = [1] * len(outputs.shape)
        shape[-1 if self.data_format == "channels_last" else 1] = -1
        return current().add_bias(outputs, ops.reshape(self.bias, shape))

    def _convolved(self, inputs: Any) -> Any:
        return self.convolution_op(inputs, self.kernel)

    def _settings(self) -> dict[str, Any]:
        """Return what each of `keras.ops` that convolves is to know."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "data_format": self.data_format,
        }


class WideTransposedConvolution(WideConvolution):
    """The same, transposed."""

    def _convolved(self, inputs: Any) -> Any:
        return ops.conv_transpose(
            inputs, self.kernel, output_padding=self.output_padding, **self._settings()
        )


class WideDepthwiseConvolution(WideConvolution):
    """The same for each channel."""

    def _convolved(self, inputs: Any) -> Any:
        return ops.depthwise_conv(inputs, self.kernel, **self._settings())


class WideSeparableConvolution(WideConvolution):
    """The same for each channel, and then across channels."""

    def _convolved(self, inputs: Any) -> Any:
        return ops.separable_conv(
            inputs, self.depthwise_kernel, self.pointwise_kernel, **self._settings()
        )


class WideProduct(QuantizesAsStock, WideBias):
    """The same for layers that multiply matrices, which can be quantized too."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Multiply `inputs` by the kernel; see the class in Keras."""
        if self.quantization_mode is not None:
            # TimeDistributed calls this itself, and in Keras takes an int8 kernel for a float one.
            return ops.cast(self.quantized_call(inputs, training=training), self._dtype_of(inputs))
        outputs = self._product(inputs)
        if self.bias is not None:
            outputs = current().add_bias(outputs, self.bias)
        return self._activated(outputs, self._dtype_of(inputs))

    def _product(self, inputs: Any) -> Any:
        raise NotImplementedError

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """Do the same under a quantized policy; Keras's code for it activates before the cast."""
        return ops.cast(super().quantized_call(*args, **kwargs), self.compute_dtype)
