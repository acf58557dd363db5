"""What layers have in common that compute in float32 between tensors of the compute dtype."""

from __future__ import annotations

from typing import Any

import keras

from kerasmp.ops import in_float32


class CallInFloat32(keras.layers.Layer):
    """Mixed in before a Keras layer: its `call` is computed in float32, forward and back.

    Inputs, outputs and gradients keep the policy's compute dtype, which is what goes through
    memory. `dtype="float32"` would make them float32 as well.
    """

    def call(self, inputs: Any) -> Any:
        """Return what the Keras layer returns, from float32 arithmetic."""
        return in_float32(super().call)(inputs)


class NeverCastWeights(keras.layers.Layer):
    """Mixed in before a Keras layer: no autocast narrows its weights, or sums their gradients."""

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Add a weight that is float32 in `call` too, so that its gradient is summed in float32."""
        return super().add_weight(*args, **{**kwargs, "autocast": False})
