"""The last layer of a classifier: a low-precision matmul, then float32 to the end."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.errors import PolicyError
from kerasmp.layers.in_float32 import NeverCastWeights
from kerasmp.ops.precision import registered, upcast_dtype


@registered
class DenseHead(NeverCastWeights, keras.layers.Dense):
    """`keras.layers.Dense` whose bias, activation and output are float32.

    Only the matmul, which is where the time goes, runs in the policy's compute dtype. A stock
    Dense with a softmax under "mixed_float16" returns float16 probabilities: small ones become 0,
    the gradient of their logarithm overflows once it is scaled, and training stops. Logits gain
    too: the loss sees the bias in full.

    Args:
        units: Size of the last axis of the output.
        activation: Name or function, applied in float32; default none (logits).
        **kwargs: As for `keras.layers.Dense`: `use_bias`, initializers, regularizers, constraints,
            `dtype`, `name`.

    Input shape:
        `(batch, ..., features)`, any float dtype.

    Output shape:
        `(batch, ..., units)`, float32 (float64 under a float64 policy).

    Raises:
        PolicyError: Under a quantised policy.

    References:
        The Keras guide on mixed precision asks for float32 outputs of the model's last activation.

    Example:

    >>> head = DenseHead(3, activation="softmax", dtype="mixed_float16")
    >>> probabilities = head(keras.ops.ones((2, 4), dtype="float16"))
    >>> keras.backend.standardize_dtype(probabilities.dtype), head.kernel.dtype
    ('float32', 'float32')
    """

    def __init__(self, units: int, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(units, activation=activation, **kwargs)
        if self.quantization_mode is not None:
            # Keras would call Dense's quantised code, whose output is in the compute dtype.
            raise PolicyError(
                "DenseHead cannot be quantised.",
                received=f'the policy "{self.dtype_policy.name}"',
                expected="a floating-point policy",
                fix='Pass one, dtype="mixed_bfloat16" say, or use keras.layers.Dense.',
            )

    gives_float32 = True  # the rules "safe" ask

    @property
    def output_dtype(self) -> str:
        """float32, or float64 where the policy computes in float64."""
        # Not result_type(), which knows no float64 on JAX and torch.
        return upcast_dtype(self.compute_dtype)

    def call(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002 - Keras's
        """Return `activation(inputs @ kernel + bias)`."""
        outputs = ops.matmul(
            ops.cast(inputs, self.compute_dtype), ops.cast(self.kernel, self.compute_dtype)
        )
        outputs = ops.cast(outputs, self.output_dtype)
        if self.bias is not None:
            outputs = ops.add(outputs, ops.cast(self.bias, self.output_dtype))
        return outputs if self.activation is None else self.activation(outputs)

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Return the symbolic output, with its true dtype."""
        shape = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, dtype=self.output_dtype)
