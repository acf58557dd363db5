"""The best that float16 can do in layers that multiply matrices: for comparison, not for use.

Products by weights are the backend's own in float16. Everything else is float32, and so are the
sums of the products within attention, whose factors are float16.
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


class MultiHeadAttention(keras.layers.MultiHeadAttention):
    def _compute_attention(self, query, key, value, *_, **__):
        outputs = _attend(query, key, value, self._inverse_sqrt_key_dim)
        return outputs, None


class GroupQueryAttention(keras.layers.GroupQueryAttention):
    def _compute_attention(self, query, key, value, *_, **__):
        outputs = _attend(query, key, value, self._inverse_sqrt_head_dim)
        return outputs, None
