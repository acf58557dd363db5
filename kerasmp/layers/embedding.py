"""Embedding whose gradient is summed in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.backend.keras_internals import AutocastScope, own_variables
from kerasmp.layers.base import Quantizable
from kerasmp.ops.precision import registered


@registered
class Embedding(Quantizable, keras.layers.Embedding):
    """`keras.layers.Embedding` that looks rows up in the float32 table and casts only those rows.

    Stock Keras casts the whole table first. On JAX and torch the gradient of a row, a sum over all
    positions of its id, is then summed in the compute dtype: an id that occurs 4,096 times in a
    batch gets half of its gradient in float16, and a sixteenth in bfloat16. This layer sums in
    float32, and no step copies the table. On TensorFlow stock Keras sums in float32 too, so this
    layer only saves the copy; gradients are sparse, as in stock Keras.

    With LoRA the table and its update are added in float32, and saved in float32, where stock Keras
    rounds the saved sum to the compute dtype.

    Args:
        input_dim: The number of rows. Ids must be smaller.
        output_dim: The size of each row.
        **kwargs: Other arguments of `keras.layers.Embedding`: `mask_zero`,
            `embeddings_initializer` and so on.

    Input shape:
        `(batch, ...)`, in any integer dtype.

    Output shape:
        `(batch, ..., output_dim)`, in the policy's compute dtype.

    Example:

    >>> layer = Embedding(5, 2, dtype="mixed_float16")
    >>> rows = layer(keras.ops.array([[0, 4, 4]]))
    >>> keras.backend.standardize_dtype(rows.dtype), tuple(rows.shape), layer.embeddings.dtype
    ('float16', (1, 3, 2), 'float32')
    """

    @property
    def embeddings(self) -> Any:
        """The table; with LoRA, its float32 sum with the update."""
        if not self.lora_enabled or self.quantization_mode is not None:
            return super().embeddings
        (table,) = (v for v in own_variables(self) if v.name == "embeddings")
        with AutocastScope(None):
            update = ops.matmul(self.lora_embeddings_a, self.lora_embeddings_b)
            return ops.add(table, (self.lora_alpha / self.lora_rank) * update)

    def call(self, inputs: Any) -> Any:
        """Look up the rows of the ids."""
        if self.quantization_mode is not None:
            # TimeDistributed calls this directly, where Keras would use the int8 table as floats.
            return ops.cast(self.quantized_call(inputs), self.compute_dtype)
        if keras.backend.standardize_dtype(inputs.dtype) not in {"int32", "int64"}:
            inputs = ops.cast(inputs, "int32")
        with AutocastScope(None):
            rows = current().take_rows(self.embeddings, inputs)
        return ops.cast(rows, self.compute_dtype)
