"""Embedding whose gradient, a sum over all places of a row, is summed in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.backend.keras_internals import AutocastScope, own_variables
from kerasmp.layers.quantizing import QuantizesAsStock
from kerasmp.ops.precision import registered


@registered
class Embedding(QuantizesAsStock, keras.layers.Embedding):
    """`keras.layers.Embedding` that takes rows of the float32 table, and casts them after.

    Stock Keras casts the whole table first. On JAX and torch the gradient of a row, a sum over all
    places where its id stands, is then summed in the compute dtype: an id that stands in a batch
    4,096 times gets half of its gradient in float16, and a sixteenth in bfloat16. Here it is summed
    in float32, and no step makes a copy of the table. On TensorFlow, where stock Keras sums in
    float32 too, it is the copy that is saved; gradients are sparse, as in stock Keras.

    With LoRA, the table and what is added to it are summed in float32 too, and saved so: stock
    Keras rounds what it saves to the compute dtype.

    Args:
        input_dim: Number of rows: ids are smaller.
        output_dim: Length of each row.
        **kwargs: As for `keras.layers.Embedding`: `mask_zero`, `embeddings_initializer` and so on.

    Input shape:
        `(batch, ...)`, ids of any integer dtype.

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
        """The table; with LoRA, the sum that it stands for, in float32."""
        if not self.lora_enabled or self.quantization_mode is not None:
            return super().embeddings
        (table,) = (v for v in own_variables(self) if v.name == "embeddings")
        with AutocastScope(None):
            added = ops.matmul(self.lora_embeddings_a, self.lora_embeddings_b)
            return ops.add(table, (self.lora_alpha / self.lora_rank) * added)

    def call(self, inputs: Any) -> Any:
        """Return the rows of the ids."""
        if self.quantization_mode is not None:
            # TimeDistributed calls this itself, and would take the int8 table for a float one.
            return ops.cast(self.quantized_call(inputs), self.compute_dtype)
        if keras.backend.standardize_dtype(inputs.dtype) not in {"int32", "int64"}:
            inputs = ops.cast(inputs, "int32")
        with AutocastScope(None):
            rows = current().take_rows(self.embeddings, inputs)
        return ops.cast(rows, self.compute_dtype)
