"""Attention and AdditiveAttention with float32 scores, softmax and scale."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.layers.in_float32 import NeverCastWeights
from kerasmp.layers.twin import twin
from kerasmp.ops.precision import upcast_dtype
from kerasmp.ops.softmax import masked_softmax

_VECTOR_PER_BATCH = 2  # the rank of a mask of the values, (batch, values)


class _Float32Scores(NeverCastWeights):
    """What makes either of Keras's two layers safe.

    The two methods with an underscore are Keras's own, documented there for layers that inherit;
    `tests/backend` tells when they move.
    """

    def _calculate_scores(self, query: Any, key: Any) -> Any:
        wide = upcast_dtype(self.compute_dtype)
        return super()._calculate_scores(ops.cast(query, wide), ops.cast(key, wide))

    def _apply_scores(
        self,
        scores: Any,
        value: Any,
        scores_mask: Any = None,
        training: bool = False,
    ) -> tuple[Any, Any]:
        if scores_mask is not None:
            scores_mask = ops.cast(scores_mask, "bool")
            if len(scores_mask.shape) == _VECTOR_PER_BATCH:
                scores_mask = ops.expand_dims(scores_mask, axis=-2)
        weights = masked_softmax(scores, scores_mask)
        if training and self.dropout > 0:
            weights = keras.random.dropout(weights, self.dropout, seed=self.seed_generator)
        outputs = ops.matmul(weights, ops.cast(value, weights.dtype))
        return ops.cast(outputs, self.compute_dtype), ops.cast(weights, self.compute_dtype)


_SHAPES = {
    "inputs": "A list: query `(batch, queries, depth)`, value `(batch, keys, value_depth)` and, if "
    "it is not the value, key `(batch, keys, depth)`",
    "outputs": "`(batch, queries, value_depth)`, and with `return_attention_scores=True` the "
    "weights `(batch, queries, keys)`",
}


@twin(
    use_scale="Whether to multiply the scores by a trainable scalar. Default False.",
    score_mode='"dot" (default) or "concat".',
    dropout="Fraction of the weights to drop while training. Default 0.",
    seed="For the dropout; default None.",
    source="[Luong et al., 2015](https://arxiv.org/abs/1508.04025)",
    **_SHAPES,
)
class Attention(_Float32Scores, keras.layers.Attention):
    """`keras.layers.Attention` with scores, softmax and scale in float32.

    The stock layer multiplies queries and keys in float16 and does not scale the products down:
    with 64 dimensions and a standard deviation of 30 they overflow, and the outputs are NaN. It
    also subtracts 65504 from masked scores, which is -inf for negative ones. Here nothing is
    rounded to float16 but the outputs, and a query whose keys are all masked gets zeros and gives
    zero gradients. Scale variables are float32 and are not cast.

    Example:

    >>> layer = Attention(dtype="mixed_float16")
    >>> x = keras.ops.full((1, 2, 64), 300.0)
    >>> y = layer([x, x])  # the scores are 5760000
    >>> keras.backend.standardize_dtype(y.dtype), float(keras.ops.max(y))
    ('float16', 300.0)
    """


@twin(
    use_scale="Whether to multiply by a trainable vector. Default True.",
    dropout="Fraction of the weights to drop while training. Default 0.",
    source="[Bahdanau et al., 2014](https://arxiv.org/abs/1409.0473)",
    **_SHAPES,
)
class AdditiveAttention(_Float32Scores, keras.layers.AdditiveAttention):
    """`keras.layers.AdditiveAttention` with tanh, scores, softmax and scale in float32.

    The stock layer sums the scores, and in the backward pass the gradients of its scale, in
    float16. Here nothing is rounded to float16 but the outputs, and a query whose keys are all
    masked gets zeros and gives zero gradients. The sums of queries and keys, which are as many
    numbers as batch, queries, keys and depth multiplied, take twice the memory.

    Example:

    >>> layer = AdditiveAttention(dtype="mixed_float16")
    >>> y = layer([keras.ops.ones((1, 2, 4)), keras.ops.ones((1, 3, 4))])
    >>> keras.backend.standardize_dtype(y.dtype), tuple(y.shape), layer.scale.dtype
    ('float16', (1, 2, 4), 'float32')
    """
