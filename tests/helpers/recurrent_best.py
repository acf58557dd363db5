"""The best that float16 can do in recurrent layers: float16 products, and float32 for the rest."""

import keras
from keras import ops


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


def layer(name, units, **kwargs):
    return keras.layers.RNN(globals()[f"{name}Cell"](units, dtype="float32"), **kwargs)
