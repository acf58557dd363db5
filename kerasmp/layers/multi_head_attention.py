"""MultiHeadAttention and GroupQueryAttention with float32 scores and softmax."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.errors import ArgumentError
from kerasmp.layers.projection import turn_projections
from kerasmp.ops.attention import (
    attend,
    attention_scores,
    causal_mask,
    combine,
    dot_product_attention,
)
from kerasmp.ops.precision import registered, upcast_dtype
from kerasmp.ops.softmax import masked_softmax

_SEQUENCES = 3  # the rank of inputs (batch, time, features), and one less than of what is projected

# Stands for a mask of nothing but causality, which flash attention has built in.
_CAUSAL = "causal"


class _WideScores(keras.layers.Layer):
    """What makes either of Keras's two layers safe.

    Scores are computed in the middle of `call`, where no public method can step in.
    `_compute_attention` is the one that Keras documents as there to be overridden, and
    `_compute_attention_mask` the one that makes what it is given. `tests/backend` tells when they
    or the attributes read here move.
    """

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        """Make the projections, whose bias gradients are summed in float32."""
        super().build(query_shape, value_shape, key_shape)
        turn_projections(self)

    def _compute_attention_mask(self, query: Any, value: Any, **masks: Any) -> Any:
        window = getattr(self, "sliding_window", getattr(self, "_sliding_window", None))
        given = [mask for name, mask in masks.items() if name != "use_causal_mask"]
        if (
            masks.get("use_causal_mask")
            and all(mask is None for mask in (*given, window))
            and len(query.shape) == _SEQUENCES
            and self._compute_attention.__module__ == __name__  # not that of a subclass
        ):
            return _CAUSAL
        return super()._compute_attention_mask(query, value, **masks)

    def _causal_too(self, mask: Any, query: Any, key: Any) -> Any:
        """Return a mask, None for none, made causal.

        Keras 3.15 leaves it to `_compute_attention` where nothing else is masked, as others may.
        """
        if mask is None and len(query.shape) == _SEQUENCES + 1:
            return _CAUSAL
        return combine(mask, causal_mask(query, key))

    def _attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        *,
        scale: float,
        training: bool | None,
        return_scores: bool,
    ) -> tuple[Any, Any]:
        """Return the attended values, and the weights if they are asked for."""
        if return_scores and self._flash_attention:
            raise ArgumentError(
                "Returning attention scores is not supported when flash attention is enabled. "
                "Please disable flash attention to access attention scores.",
                received="return_attention_scores=True, flash_attention=True",
                expected="one of them",
                fix="Leave flash_attention at None.",
            )
        is_causal = mask is _CAUSAL
        mask = None if is_causal else _with_heads(mask, query)
        if not (return_scores or (training and self.dropout > 0)):
            outputs = dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                scale=scale,
                is_causal=is_causal,
                flash_attention=self._flash_attention,
            )
            return outputs, None
        if is_causal:
            mask = causal_mask(query, key)
        weights = masked_softmax(attention_scores(query, key, scale), mask)
        outputs = attend(self._dropped(weights, training), value, self.compute_dtype)
        return outputs, ops.cast(weights, self.compute_dtype)

    def _dropped(self, weights: Any, training: bool | None) -> Any:
        if not (training and self.dropout > 0):
            return weights
        # Keras's layer itself would cast the weights to float16.
        seed = self._dropout_layer.seed_generator
        return keras.random.dropout(weights, self.dropout, seed=seed)


def _with_heads(mask: Any, query: Any) -> Any:
    """Return the mask with axes of size 1 before its last two, up to the rank of the query."""
    if mask is None:
        return None
    for _ in range(len(query.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, axis=-3)
    return ops.cast(mask, "bool")


@registered
class MultiHeadAttention(_WideScores, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with scores and softmax in float32.

    The stock layer computes the products of queries and keys in float16, where large ones
    overflow to NaN and others lose digits, and on some paths the softmax too. Here the projections,
    which is where the time goes, are in the compute dtype, and what is between them is rounded to
    it once, at the end. The gradients of their biases are summed in float32. No mask can overflow,
    and a query that may see no key gets zeros and gives zero gradients, where stock Keras averages
    over all keys. Under a causal mask alone, and where there is no mask, flash attention is used if
    the device has it, as in stock Keras.

    Args:
        num_heads: Number of heads.
        key_dim: Size of each head for queries and keys.
        value_dim: Size of each head for values; default None is `key_dim`.
        dropout: Fraction of the weights to drop while training. Default 0.
        **kwargs: As for `keras.layers.MultiHeadAttention`: `use_bias`, `output_shape`,
            `attention_axes`, `flash_attention`, initializers, regularizers, constraints, `seed`,
            `dtype`, `name`, and what newer versions of Keras add.

    Input shape:
        Query `(batch, queries, features)`, value `(batch, keys, features)` and, if it is not the
        value, key `(batch, keys, features)`, of any float dtype; more axes with `attention_axes`.

    Output shape:
        That of the query, or with `output_shape` other features; and with
        `return_attention_scores=True` the weights `(batch, heads, queries, keys)`. Both are in the
        policy's compute dtype.

    Raises:
        ArgumentError: If attention scores are to be returned and `flash_attention` is True.

    References:
        [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)

    Example:

    >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, dtype="mixed_float16")
    >>> y = layer(keras.ops.ones((1, 3, 8)), keras.ops.ones((1, 5, 8)), use_causal_mask=True)
    >>> keras.backend.standardize_dtype(y.dtype), tuple(y.shape), layer.query_dense.kernel.dtype
    ('float16', (1, 3, 8), 'float32')
    """

    def _compute_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> tuple[Any, Any]:
        scale = self.key_dim**-0.5
        if use_causal_mask:
            attention_mask = self._causal_too(attention_mask, query, key)
        if len(query.shape) > _SEQUENCES + 1:
            return self._attend_over_axes(query, key, value, attention_mask, scale, training)
        return self._attend(
            query,
            key,
            value,
            attention_mask,
            scale=scale,
            training=training,
            return_scores=return_attention_scores,
        )

    def _attend_over_axes(
        self,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scale: float,
        training: bool | None,
    ) -> tuple[Any, Any]:
        """Attend over several axes, or besides others, by the equations that Keras made."""
        dtype = upcast_dtype(self.compute_dtype)
        query, key, value = (ops.cast(x, dtype) for x in (query, key, value))
        scores = ops.einsum(self._dot_product_equation, key, query) * scale
        if mask is not None:
            heads = -2 * len(self.attention_axes) - 1
            for _ in range(len(scores.shape) - len(mask.shape)):
                mask = ops.expand_dims(mask, axis=heads)
            mask = ops.cast(mask, "bool")
        rank = len(scores.shape)
        axes = tuple(range(rank - len(self.attention_axes), rank))
        weights = masked_softmax(scores, mask, axis=axes)
        outputs = ops.einsum(self._combine_equation, self._dropped(weights, training), value)
        return ops.cast(outputs, self.compute_dtype), ops.cast(weights, self.compute_dtype)


@registered
class GroupedQueryAttention(_WideScores, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with scores and softmax in float32.

    As `kerasmp.layers.MultiHeadAttention`, with fewer heads for keys and values than for queries.

    Args:
        head_dim: Size of each head.
        num_query_heads: Number of heads of the queries.
        num_key_value_heads: Number of heads of keys and values; it divides `num_query_heads`.
        dropout: Fraction of the weights to drop while training. Default 0.
        **kwargs: As for `keras.layers.GroupQueryAttention`: `use_bias`, `flash_attention`,
            initializers, regularizers, constraints, `seed`, `dtype`, `name`, and what newer
            versions of Keras add.

    Input shape:
        Query `(batch, queries, features)`, value `(batch, keys, features)` and, if it is not the
        value, key `(batch, keys, features)`, of any float dtype.

    Output shape:
        That of the query; and with `return_attention_scores=True` the weights
        `(batch, num_query_heads, queries, keys)`. Both are in the policy's compute dtype.

    Raises:
        ArgumentError: If attention scores are to be returned and `flash_attention` is True.

    References:
        [Ainslie et al., 2023](https://arxiv.org/abs/2305.13245)

    Example:

    >>> layer = GroupQueryAttention(
    ...     head_dim=4, num_query_heads=4, num_key_value_heads=2, dtype="mixed_float16"
    ... )
    >>> y = layer(keras.ops.ones((1, 3, 8)), keras.ops.ones((1, 5, 8)))
    >>> keras.backend.standardize_dtype(y.dtype), tuple(y.shape)
    ('float16', (1, 3, 8))
    """

    def _compute_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> tuple[Any, Any]:
        if use_causal_mask:
            attention_mask = self._causal_too(attention_mask, query, key)
        return self._attend(
            query,
            key,
            value,
            attention_mask,
            scale=self.head_dim**-0.5,
            training=training,
            return_scores=self._return_attention_scores,
        )


# As in Keras, whose class is called the one and exported as the other: saved weights are found by
# the name of the class.
GroupQueryAttention = GroupedQueryAttention
