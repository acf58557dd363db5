"""What layers with a bias share: its gradient, a sum over all positions, is summed in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp.backend import current
from kerasmp.backend.keras_private import AutocastScope

if TYPE_CHECKING:
    from collections.abc import Callable


class WideBias:
    """Adds the bias in float32 where the backend would sum its gradient in the compute dtype."""

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Add a weight; the bias is not cast if adding it in float32 is what sums in float32."""
        if kwargs.get("name") == "bias" and current().NARROW_SUMS:
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)  # type: ignore[misc]  # the layer mixed in has it

    def _narrowed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call Keras's `call`, cast what it returns to the compute dtype, and activate that.

        An activation in float32 would keep float32 tensors for the backward pass.
        """
        layer: Any = self
        activation = layer.activation
        # Around Keras's own __setattr__: this is no state.
        object.__setattr__(layer, "activation", None)
        try:
            outputs = ops.cast(call(*args, **kwargs), layer.compute_dtype)
        finally:
            object.__setattr__(layer, "activation", activation)
        return outputs if activation is None else activation(outputs)


class WideConvolution(WideBias):
    """The same for convolutions, which compute in float32 where float16 has no good kernels."""

    def call(self, inputs: Any) -> Any:
        """Convolve `inputs`; see the class in Keras."""
        layer: Any = self
        call = super().call  # type: ignore[misc]  # the layer mixed in has it
        dtype = current().convolution_dtype(layer.compute_dtype)
        # LoRA gives a kernel in the compute dtype, whatever is asked for.
        if dtype == layer.compute_dtype or getattr(layer, "lora_enabled", False):
            return self._narrowed(call, inputs)
        with AutocastScope(dtype):
            return self._narrowed(call, ops.cast(inputs, dtype))


class WideProduct(WideBias):
    """The same for layers that multiply matrices, which can be quantized too."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: FBT001 - Keras's
        """Multiply `inputs` by the kernel; see the class in Keras."""
        return self._narrowed(super().call, inputs, training=training)  # type: ignore[misc]  # the layer mixed in has it

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """Do the same under a quantized policy."""
        return self._narrowed(super().quantized_call, *args, **kwargs)  # type: ignore[misc]  # the layer mixed in has it
