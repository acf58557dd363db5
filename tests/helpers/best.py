"""The best possible results of layers that multiply matrices in half precision, to compare with.

Products by weights are those of the backend in half precision. Everything else is float32,
including the sums of products within attention, whose factors are in half precision. If a softmax
has a single weight, its only error is that of the backend's float32 softmax: TensorFlow multiplies
by a reciprocal, so without oneDNN a weight of 1 becomes 1 - 2^-24.
"""

import keras
from keras import ops


def narrow(x, half):
    """Round a tensor and its gradient to half precision."""
    return ops.cast(ops.cast(x, half), "float32")


def _attend(query, key, value, scale, half):
    """Return softmax(query @ key * scale) @ value for (batch, time, heads, features)."""
    query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
    scores = ops.einsum("btnh,bsnh->bnts", query, key) * scale
    weights = narrow(ops.softmax(scores), half)
    return ops.cast(ops.einsum("bnts,bsnh->btnh", weights, value), half)


class Attention(keras.layers.Attention):
    def call(self, inputs):
        outputs = super().call([ops.cast(x, "float32") for x in inputs])
        return ops.cast(outputs, self.compute_dtype)


class MultiHeadAttention(keras.layers.MultiHeadAttention):
    def _compute_attention(self, query, key, value, *_, **__):
        scale = self._inverse_sqrt_key_dim
        return _attend(query, key, value, scale, self.compute_dtype), None


class GroupQueryAttention(keras.layers.GroupQueryAttention):
    def _compute_attention(self, query, key, value, *_, **__):
        scale = self._inverse_sqrt_head_dim
        return _attend(query, key, value, scale, self.compute_dtype), None


class _Separable:
    """A layer whose two products are float32, with a half-precision tensor between them."""

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        between = ops.depthwise_conv(x, ops.cast(self.depthwise_kernel, "float32"))
        x = narrow(between, self.compute_dtype)
        x = ops.conv(x, ops.cast(self.pointwise_kernel, "float32"))
        return ops.cast(x + ops.cast(self.bias, "float32"), self.compute_dtype)


class SeparableConv1D(_Separable, keras.layers.SeparableConv1D):
    pass


class SeparableConv2D(_Separable, keras.layers.SeparableConv2D):
    pass


class _Product:
    """A layer whose bias is float32, since its gradient is a sum."""

    def add_weight(self, *args, **kwargs):
        narrow = kwargs.get("name") != "bias"
        return super().add_weight(*args, **{**kwargs, "autocast": narrow})

    def call(self, inputs):
        outputs = ops.cast(self.product(inputs), "float32") + self.bias
        return ops.cast(outputs, self.compute_dtype)


class Dense(_Product, keras.layers.Dense):
    def product(self, inputs):
        return ops.matmul(inputs, self.kernel)


class EinsumDense(_Product, keras.layers.EinsumDense):
    def product(self, inputs):
        return ops.einsum(self.equation, inputs, self.kernel)


class _Cell:
    """A cell whose states are float32."""

    def product(self, inputs, kernel):
        factors = (ops.cast(x, self.half) for x in (inputs, kernel))
        return ops.cast(ops.matmul(*factors), "float32")


class LSTMCell(_Cell, keras.layers.LSTMCell):
    def call(self, inputs, states, training=False):  # noqa: ARG002, FBT002 - Keras's signature
        output, carry = states
        gates = self.product(inputs, self.kernel) + self.product(output, self.recurrent_kernel)
        gates = gates + self.bias
        enter, forget, candidate, leave = ops.split(gates, 4, -1)
        carry = ops.sigmoid(forget) * carry + ops.sigmoid(enter) * ops.tanh(candidate)
        output = ops.sigmoid(leave) * ops.tanh(carry)
        return output, [output, carry]


class GRUCell(_Cell, keras.layers.GRUCell):
    def call(self, inputs, states, training=False):  # noqa: ARG002, FBT002 - Keras's signature
        (state,) = keras.tree.flatten(states)
        new = ops.split(self.product(inputs, self.kernel) + self.bias[0], 3, -1)
        old = ops.split(self.product(state, self.recurrent_kernel) + self.bias[1], 3, -1)
        update, reset = ops.sigmoid(new[0] + old[0]), ops.sigmoid(new[1] + old[1])
        state = update * state + (1 - update) * ops.tanh(new[2] + reset * old[2])
        return state, [state]


class _RNN(keras.layers.RNN):
    def __init__(self, units, return_sequences, dtype):
        super().__init__(self.CELL(units, dtype="float32"), return_sequences, dtype=dtype)
        self.cell.half = self.compute_dtype

    def call(self, sequences, initial_state=None, mask=None, training=False):  # noqa: FBT002 - Keras's
        outputs = super().call(sequences, initial_state, mask, training)
        return ops.cast(outputs, self.compute_dtype)


class LSTM(_RNN):
    CELL = LSTMCell


class GRU(_RNN):
    CELL = GRUCell
