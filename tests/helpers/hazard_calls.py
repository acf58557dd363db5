"""Ways to call the layers of `helpers.hazards`."""

import keras
from keras import ops

SCALE = 2.0**15  # the initial loss scale


def plain(layer, *inputs):
    return layer(*inputs)


def training(layer, x):
    return layer(x, training=True)


def together(layer, *inputs):
    return layer(list(inputs))


def to_itself(layer, x):
    return layer([x, x])


def masked(layer, x, mask):
    return layer(x, mask=mask)


def self_attention(layer, x):
    return layer(x, x)


def with_scores(layer, x):
    return layer(x, x, return_attention_scores=True)[0]


def masked_attention(layer, query, value, mask):
    return layer([query, value], mask=[None, mask])


def nothing_where_all_is_masked(layer, query, value, mask):
    some = ops.any(mask, axis=-1)[:, None, None]
    return ops.where(some, masked_attention(layer, query, value, mask), 0)


def mean_of_unmasked(_, x, mask):
    weights = ops.cast(mask, x.dtype)[..., None]
    return ops.sum(x * weights, 1) / ops.maximum(ops.sum(weights, 1), 1)


def mean_of_everything(_, x):
    return ops.mean(x, (1, 2, 3), keepdims=True)


def unit_or_zeros(_, x):
    squares = ops.sum(ops.square(x), -1, keepdims=True)
    some = squares > 0
    return ops.where(some, x * ops.rsqrt(ops.where(some, squares, 1)), 0)


def extra_losses(layer, x):
    layer(x)
    return layer.losses


def kernel_after_training(layer, x):
    layer(x, training=True)
    return ops.convert_to_tensor(layer.layer.kernel)


def cross_entropy(layer, x, labels):
    loss = keras.losses.SparseCategoricalCrossentropy()(labels, layer(x))
    return ops.multiply(loss, SCALE)


def binary_cross_entropy(layer, x, targets):
    return ops.multiply(keras.losses.BinaryCrossentropy()(targets, layer(x)), SCALE)


def steps(layer, x):
    """Return the outputs of a SimpleRNN, which Keras on JAX computes in float32 for float64."""
    if not layer.built:
        layer.build(x.shape)
    kernel, recurrent, bias = map(ops.convert_to_tensor, layer.trainable_variables)
    states = [ops.tanh(x[:, 0] @ kernel + bias)]
    for step in range(1, x.shape[1]):
        states.append(ops.tanh(x[:, step] @ kernel + bias + states[-1] @ recurrent))
    return ops.stack(states, 1)
