"""Dense layers whose bias gradient, a sum over all rows, is summed in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.layers.bias import WideProduct
from kerasmp.layers.twin import twin


@twin(
    units="Size of the last axis of the output.",
    inputs="`(batch, ..., features)`",
    outputs="`(batch, ..., units)`",
)
class Dense(WideProduct, keras.layers.Dense):
    """`keras.layers.Dense` whose bias gradient is summed in float32.

    Stock Keras sums it over all rows and positions, on JAX in the compute dtype, and on TensorFlow
    in bfloat16: of 4,096 ones it makes 256 there. On torch this layer computes what the stock one
    does. For the last layer of a model see `kerasmp.layers.DenseHead`.

    Example:

    >>> layer = Dense(2, activation="relu", dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 3))).shape == (1, 2)
    True
    """

    def _product(self, inputs: Any) -> Any:
        return ops.matmul(inputs, self.kernel)


@twin(
    equation="Einsum equation of the inputs and the kernel.",
    output_shape="Shape of the output without the batch axis.",
    inputs="As the equation says",
    outputs="As the equation says",
)
class EinsumDense(WideProduct, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` whose bias gradient is summed in float32.

    Stock Keras sums it over all rows and positions, on JAX in the compute dtype, and on TensorFlow
    in bfloat16, or in float16 too where the bias has several axes or not the last one. On torch
    this layer computes what the stock one does.

    Example:

    >>> layer = EinsumDense("abc,cd->abd", (None, 2), bias_axes="d", dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 3))).shape == (1, 4, 2)
    True
    """

    def _product(self, inputs: Any) -> Any:
        return ops.einsum(self.equation, inputs, self.kernel)
