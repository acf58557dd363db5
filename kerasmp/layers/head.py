"""The last layer of a model: only its matrix product is computed in low precision."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.errors import PolicyError
from kerasmp.layers.base import Float32Weights
from kerasmp.ops.precision import registered, upcast_dtype


@registered
class DenseHead(Float32Weights, keras.layers.Dense):
    """`keras.layers.Dense` whose bias, activation and output are float32.

    Only the matrix product, which takes most of the time, is computed in the policy's compute
    dtype. A stock Dense with a softmax returns float16 probabilities under "mixed_float16": small
    ones become 0, the scaled gradient of their logarithm overflows, and training stops. Logits
    improve too, because the loss sees the unrounded bias.

    Args:
        units: The size of the last axis of the output.
        activation: The name or the function, computed in float32. Defaults to `None`, for logits.
        **kwargs: Other arguments of `keras.layers.Dense`: `use_bias`, initializers, regularizers,
            constraints, `dtype`, `name`.

    Input shape:
        `(batch, ..., features)`, in any float dtype.

    Output shape:
        `(batch, ..., units)`, in float32, or in float64 under a float64 policy.

    Raises:
        PolicyError: If the policy is quantized.

    References:
        The Keras guide on mixed precision recommends float32 outputs for the last activation.

    Example:

    >>> head = DenseHead(3, activation="softmax", dtype="mixed_float16")
    >>> probabilities = head(keras.ops.ones((2, 4), dtype="float16"))
    >>> keras.backend.standardize_dtype(probabilities.dtype), head.kernel.dtype
    ('float32', 'float32')
    """

    def __init__(self, units: int, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(units, activation=activation, **kwargs)
        if self.quantization_mode is not None:
            # Keras would call Dense's quantized code, which returns the compute dtype.
            raise PolicyError(
                "DenseHead does not support quantized policies.",
                received=f'the policy "{self.dtype_policy.name}"',
                expected="a floating-point policy",
                fix='Pass dtype="mixed_bfloat16", for example, or use keras.layers.Dense.',
            )

    gives_float32 = True  # read by the "safe" rules

    @property
    def output_dtype(self) -> str:
        """float32, or float64 if the policy computes in float64."""
        # Not result_type(), which does not support float64 on JAX and torch.
        return upcast_dtype(self.compute_dtype)

    def call(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002, FBT001 - Keras's signature
        """Compute `activation(inputs @ kernel + bias)`."""
        outputs = ops.matmul(
            ops.cast(inputs, self.compute_dtype), ops.cast(self.kernel, self.compute_dtype)
        )
        outputs = ops.cast(outputs, self.output_dtype)
        if self.bias is not None:
            outputs = ops.add(outputs, ops.cast(self.bias, self.output_dtype))
        return outputs if self.activation is None else self.activation(outputs)

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Return the symbolic output with its actual dtype."""
        shape = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, dtype=self.output_dtype)
