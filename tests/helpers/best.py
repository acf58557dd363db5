"""The best that float16 can do in layers that multiply matrices: for comparison, not for use.

Products by weights are the backend's own in float16. Everything else is float32, and so are the
sums of the products within attention, whose factors are float16. Where a softmax is one weight
alone, all that can be wrong of it is the backend's own softmax in float32: TensorFlow's multiplies
by a reciprocal, so that without oneDNN a weight of 1 is 1 - 2^-24.
"""

import keras
from keras import ops


def narrow(x):
    """Round to float16, and the gradient too."""
    return ops.cast(ops.cast(x, "float16"), "float32")


def _attend(query, key, value, scale):
    """Return softmax(query @ key * scale) @ value for (batch, time, heads, features)."""
    query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
    scores = ops.einsum("btnh,bsnh->bnts", query, key) * scale
    weights = narrow(ops.softmax(scores))
    return ops.cast(ops.einsum("bnts,bsnh->btnh", weights, value), "float16")


class Attention(keras.layers.Attention):
    def call(self, inputs):
        outputs = super().call([ops.cast(x, "float32") for x in inputs])
        return ops.cast(outputs, "float16")


class MultiHeadAttention(keras.layers.MultiHeadAttention):
    def _compute_attention(self, query, key, value, *_, **__):
        outputs = _attend(query, key, value, self._inverse_sqrt_key_dim)
        return outputs, None


class GroupQueryAttention(keras.layers.GroupQueryAttention):
    def _compute_attention(self, query, key, value, *_, **__):
        outputs = _attend(query, key, value, self._inverse_sqrt_head_dim)
        return outputs, None


class _Separable:
    """What comes between the two products is float16, the products themselves are float32."""

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        x = narrow(ops.depthwise_conv(x, ops.cast(self.depthwise_kernel, "float32")))
        x = ops.conv(x, ops.cast(self.pointwise_kernel, "float32"))
        return ops.cast(x + ops.cast(self.bias, "float32"), "float16")


class SeparableConv1D(_Separable, keras.layers.SeparableConv1D):
    pass


class SeparableConv2D(_Separable, keras.layers.SeparableConv2D):
    pass


def product(inputs, kernel):
    return ops.cast(ops.matmul(*(ops.cast(x, "float16") for x in (inputs, kernel))), "float32")


class LSTMCell(keras.layers.LSTMCell):
    def call(self, inputs, states, training=False):  # noqa: ARG002, FBT002 - Keras's signature
        output, carry = states
        gates = product(inputs, self.kernel) + product(output, self.recurrent_kernel) + self.bias
        enter, forget, candidate, leave = ops.split(gates, 4, -1)
        carry = ops.sigmoid(forget) * carry + ops.sigmoid(enter) * ops.tanh(candidate)
        output = ops.sigmoid(leave) * ops.tanh(carry)
        return output, [output, carry]


class GRUCell(keras.layers.GRUCell):
    def call(self, inputs, states, training=False):  # noqa: ARG002, FBT002 - Keras's signature
        (state,) = keras.tree.flatten(states)
        new = ops.split(product(inputs, self.kernel) + self.bias[0], 3, -1)
        old = ops.split(product(state, self.recurrent_kernel) + self.bias[1], 3, -1)
        update, reset = ops.sigmoid(new[0] + old[0]), ops.sigmoid(new[1] + old[1])
        state = update * state + (1 - update) * ops.tanh(new[2] + reset * old[2])
        return state, [state]


class _RNN(keras.layers.RNN):
    def __init__(self, units, return_sequences, dtype):
        super().__init__(self.CELL(units, dtype="float32"), return_sequences, dtype=dtype)

    def call(self, sequences, initial_state=None, mask=None, training=False):  # noqa: FBT002 - Keras's
        return ops.cast(super().call(sequences, initial_state, mask, training), "float16")


class LSTM(_RNN):
    CELL = LSTMCell


class GRU(_RNN):
    CELL = GRUCell
