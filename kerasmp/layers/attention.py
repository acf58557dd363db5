"""Attention layers with float32 scores and softmax."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.backend.keras_internals import flatten_layers, set_autocast
from kerasmp.errors import ArgumentError
from kerasmp.layers import products
from kerasmp.layers.base import Float32Weights, drop_in, without_type_check
from kerasmp.ops.attention import (
    attend,
    attention_scores,
    causal_mask,
    combine,
    dot_product_attention,
)
from kerasmp.ops.precision import registered, upcast_dtype
from kerasmp.ops.softmax import masked_softmax

# ------------------------------------------------------------------- Attention, AdditiveAttention

_VALUE_MASK_RANK = 2  # (batch, keys)


class _Float32Scores(Float32Weights):
    """A mixin that computes scores and softmax in float32.

    Keras documents the two underscored methods for subclasses to override. `tests/backend` fails
    when Keras changes them.
    """

    def _calculate_scores(self, query: Any, key: Any) -> Any:
        dtype = upcast_dtype(self.compute_dtype)
        return super()._calculate_scores(ops.cast(query, dtype), ops.cast(key, dtype))

    def _apply_scores(
        self,
        scores: Any,
        value: Any,
        scores_mask: Any = None,
        training: bool = False,  # noqa: FBT001, FBT002 - Keras's signature
    ) -> tuple[Any, Any]:
        if scores_mask is not None:
            scores_mask = ops.cast(scores_mask, "bool")
            if len(scores_mask.shape) == _VALUE_MASK_RANK:
                scores_mask = ops.expand_dims(scores_mask, axis=-2)
        weights = masked_softmax(scores, scores_mask)
        if training and self.dropout > 0:
            weights = keras.random.dropout(weights, self.dropout, seed=self.seed_generator)
        outputs = ops.matmul(weights, ops.cast(value, weights.dtype))
        return ops.cast(outputs, self.compute_dtype), ops.cast(weights, self.compute_dtype)


_DROPOUT = "The fraction of the attention weights to drop while training. Defaults to 0."
_SHAPES: dict[str, Any] = {
    "inputs": "A list: query `(batch, queries, depth)`, value `(batch, keys, value_depth)` and, if "
    "it differs from the value, key `(batch, keys, depth)`",
    "outputs": "`(batch, queries, value_depth)`, and with `return_attention_scores=True` the "
    "weights `(batch, queries, keys)`",
}


@drop_in(
    use_scale="Whether to multiply the scores by a trainable scalar. Defaults to `False`.",
    score_mode='"dot" or "concat". Defaults to "dot".',
    dropout=_DROPOUT,
    seed="The seed for dropout. Defaults to `None`.",
    source="[Luong et al., 2015](https://arxiv.org/abs/1508.04025)",
    **_SHAPES,
)
class Attention(_Float32Scores, keras.layers.Attention):
    """`keras.layers.Attention` with scores, softmax and scale in float32.

    The stock layer multiplies queries and keys in float16 without scaling the products down: with
    64 dimensions and a standard deviation of 30 they overflow, and the outputs are NaN. It also
    subtracts 65504 from masked scores, which gives -inf if they are negative. This layer rounds
    only the outputs to float16. A query whose keys are all masked gets zeros and zero gradients.
    The scale variables are not autocast.

    Example:

    >>> layer = Attention(dtype="mixed_float16")
    >>> x = keras.ops.full((1, 2, 64), 300.0)
    >>> y = layer([x, x])  # the scores are 5760000
    >>> keras.backend.standardize_dtype(y.dtype), float(keras.ops.max(y))
    ('float16', 300.0)
    """


@drop_in(
    use_scale="Whether to multiply by a trainable vector. Defaults to `True`.",
    dropout=_DROPOUT,
    source="[Bahdanau et al., 2014](https://arxiv.org/abs/1409.0473)",
    **_SHAPES,
)
class AdditiveAttention(_Float32Scores, keras.layers.AdditiveAttention):
    """`keras.layers.AdditiveAttention` with tanh, scores, softmax and scale in float32.

    The stock layer sums the scores, and in the backward pass the gradients of its scale, in
    float16. This layer rounds only the outputs to float16. A query whose keys are all masked gets
    zeros and zero gradients. The sums of queries and keys, a tensor of shape
    `(batch, queries, keys, depth)`, take twice the memory.

    Example:

    >>> layer = AdditiveAttention(dtype="mixed_float16")
    >>> y = layer([keras.ops.ones((1, 2, 4)), keras.ops.ones((1, 3, 4))])
    >>> keras.backend.standardize_dtype(y.dtype), tuple(y.shape), layer.scale.dtype
    ('float16', (1, 2, 4), 'float32')
    """


# -------------------------------------------------------- MultiHeadAttention, GroupQueryAttention

_INPUT_RANK = 3  # (batch, time, features); with heads, projected tensors have one axis more

# Stands for a causal mask and no other, which flash attention has built in.
_CAUSAL = "causal"


class EinsumDense(products.EinsumDense):
    """The projections of attention, under the name of Keras's class.

    Saved layer policies contain that name, some from before projections were replaced.
    """


def stock_projections(attention: Any) -> list[Any]:
    """Return the stock EinsumDense layers inside an attention layer."""
    return [x for x in flatten_layers(attention)[1:] if type(x) is keras.layers.EinsumDense]


class _Float32MultiHead(keras.layers.Layer):
    """A mixin that computes scores and softmax in float32, in the middle of Keras's `call`.

    No public method can change that part. Keras documents `_compute_attention` for subclasses to
    override, and `_compute_attention_mask` makes its mask. `tests/backend` fails when Keras changes
    them or the attributes that are read here.
    """

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        """Create the projections, whose bias gradients are summed in float32."""
        super().build(query_shape, value_shape, key_shape)
        # Keras offers no way to create projections of another class.
        for projection in stock_projections(self):
            projection.__class__ = EinsumDense
            # Not through Keras's __setattr__, which has locked the layer.
            object.__setattr__(projection, "quantize", without_type_check(projection.quantize))
            if projection.bias is not None and current().SUMS_IN_COMPUTE_DTYPE:
                set_autocast(projection.bias, to=False)

    def _compute_attention_mask(self, query: Any, value: Any, **masks: Any) -> Any:
        window = getattr(self, "sliding_window", getattr(self, "_sliding_window", None))
        given = [mask for name, mask in masks.items() if name != "use_causal_mask"]
        if (
            masks.get("use_causal_mask")
            and all(mask is None for mask in (*given, window))
            and len(query.shape) == _INPUT_RANK
            and self._compute_attention.__module__ == __name__  # no subclass overrides it
        ):
            return _CAUSAL
        return super()._compute_attention_mask(query, value, **masks)

    def _make_causal(self, mask: Any, query: Any, key: Any) -> Any:
        """Combine a mask, or None, with the causal mask.

        Keras 3.15 leaves this to `_compute_attention` if there is no other mask. Subclasses may do
        so in other cases.
        """
        if mask is None and len(query.shape) == _INPUT_RANK + 1:
            return _CAUSAL
        return combine(mask, causal_mask(query, key))

    def _attend(  # noqa: PLR0913 - Keras's signature
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
        """Return the attention outputs, and the weights or None."""
        if return_scores and self._flash_attention:
            raise ArgumentError(
                "Returning attention scores is not supported when flash attention is enabled. "
                "Please disable flash attention to access attention scores.",
                received="return_attention_scores=True, flash_attention=True",
                expected="one of them",
                fix="Leave flash_attention at None.",
            )
        is_causal = mask is _CAUSAL
        mask = None if is_causal else _add_head_axes(mask, query)
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
        outputs = attend(self._drop(weights, training), value, self.compute_dtype)
        return outputs, ops.cast(weights, self.compute_dtype)

    def _drop(self, weights: Any, training: bool | None) -> Any:  # noqa: FBT001
        if not (training and self.dropout > 0):
            return weights
        # Keras's Dropout layer would cast the weights to float16.
        seed = self._dropout_layer.seed_generator
        return keras.random.dropout(weights, self.dropout, seed=seed)


def _add_head_axes(mask: Any, query: Any) -> Any:
    """Insert axes of size 1 before the last two of a mask, up to the rank of the query."""
    if mask is None:
        return None
    for _ in range(len(query.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, axis=-3)
    return ops.cast(mask, "bool")


@registered
class MultiHeadAttention(_Float32MultiHead, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with scores and softmax in float32.

    The stock layer multiplies queries and keys in float16, where large products overflow to NaN and
    others lose digits, and on some paths computes the softmax in float16 too. This layer computes
    the projections, which take most of the time, in the compute dtype, and everything between them
    in float32, rounding once at the end. The bias gradients of the projections are summed in
    float32. No mask can overflow. A query that may attend to no key gets zeros and zero gradients,
    where stock Keras averages over all keys. Without a mask, or with only a causal mask, the layer
    uses flash attention if the device supports it, as stock Keras does.

    Args:
        num_heads: The number of heads.
        key_dim: The size of each head for queries and keys.
        value_dim: The size of each head for values. Defaults to `key_dim`.
        dropout: The fraction of the attention weights to drop while training. Defaults to 0.
        **kwargs: Other arguments of `keras.layers.MultiHeadAttention`: `use_bias`, `output_shape`,
            `attention_axes`, `flash_attention`, initializers, regularizers, constraints, `seed`,
            `dtype`, `name`, and those that newer versions of Keras add.

    Input shape:
        Query `(batch, queries, features)`, value `(batch, keys, features)` and, if it differs from
        the value, key `(batch, keys, features)`, in any float dtype. With `attention_axes` there
        may be more axes.

    Output shape:
        Same as the query, with the last axes given by `output_shape` if it is set, and with
        `return_attention_scores=True` the weights `(batch, heads, queries, keys)`. Both are in the
        policy's compute dtype.

    Raises:
        ArgumentError: If `return_attention_scores=True` and `flash_attention=True`.

    References:
        [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)

    Example:

    >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, dtype="mixed_float16")
    >>> y = layer(keras.ops.ones((1, 3, 8)), keras.ops.ones((1, 5, 8)), use_causal_mask=True)
    >>> keras.backend.standardize_dtype(y.dtype), tuple(y.shape), layer.query_dense.kernel.dtype
    ('float16', (1, 3, 8), 'float32')
    """

    def _compute_attention(  # noqa: PLR0913, PLR0917 - Keras's signature
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,  # noqa: FBT001
        return_attention_scores: bool = False,  # noqa: FBT001, FBT002
        use_causal_mask: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Any, Any]:
        scale = self.key_dim**-0.5
        if use_causal_mask:
            attention_mask = self._make_causal(attention_mask, query, key)
        if len(query.shape) > _INPUT_RANK + 1:
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

    def _attend_over_axes(  # noqa: PLR0913, PLR0917
        self,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scale: float,
        training: bool | None,  # noqa: FBT001
    ) -> tuple[Any, Any]:
        """Attend over several axes, or next to further axes, with Keras's einsum equations."""
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
        outputs = ops.einsum(self._combine_equation, self._drop(weights, training), value)
        return ops.cast(outputs, self.compute_dtype), ops.cast(weights, self.compute_dtype)


@registered
class GroupedQueryAttention(_Float32MultiHead, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with scores and softmax in float32.

    It works like `kerasmp.layers.MultiHeadAttention`, with fewer heads for keys and values than for
    queries.

    Args:
        head_dim: The size of each head.
        num_query_heads: The number of query heads.
        num_key_value_heads: The number of key and value heads, a divisor of `num_query_heads`.
        dropout: The fraction of the attention weights to drop while training. Defaults to 0.
        **kwargs: Other arguments of `keras.layers.GroupQueryAttention`: `use_bias`,
            `flash_attention`, initializers, regularizers, constraints, `seed`, `dtype`, `name`, and
            those that newer versions of Keras add.

    Input shape:
        Query `(batch, queries, features)`, value `(batch, keys, features)` and, if it differs from
        the value, key `(batch, keys, features)`, in any float dtype.

    Output shape:
        Same as the query, and with `return_attention_scores=True` the weights
        `(batch, num_query_heads, queries, keys)`. Both are in the policy's compute dtype.

    Raises:
        ArgumentError: If `return_attention_scores=True` and `flash_attention=True`.

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

    def _compute_attention(  # noqa: PLR0913, PLR0917
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,  # noqa: FBT001
        use_causal_mask: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Any, Any]:
        if use_causal_mask:
            attention_mask = self._make_causal(attention_mask, query, key)
        return self._attend(
            query,
            key,
            value,
            attention_mask,
            scale=self.head_dim**-0.5,
            training=training,
            return_scores=self._return_attention_scores,
        )


# Keras also exports its class under another name than its own, and saved weights are found by the
# name of the class.
GroupQueryAttention = GroupedQueryAttention
