"""Dot-product attention with float32 scores and softmax between tensors of any float dtype."""

from __future__ import annotations

import math
import numbers
from typing import Any

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.errors import ArgumentError, check_bool
from kerasmp.ops.precision import registered, upcast_dtype
from kerasmp.ops.softmax import hide

# Heads are the third axis of the inputs, and the second of the matrix products:
# (batch, heads, time, depth).
_RANK = 4
_HEADS_FIRST = (0, 2, 1, 3)
_HEADS_FIRST_TRANSPOSED = (0, 2, 3, 1)


def dot_product_attention(  # noqa: PLR0913, PLR0917 - Keras's signature
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    scale: float | None = None,
    is_causal: bool = False,  # noqa: FBT001, FBT002 - Keras's signature
    flash_attention: bool | None = None,  # noqa: FBT001
    attn_logits_soft_cap: float | None = None,
) -> Any:
    """Compute `softmax(query @ key * scale + bias) @ value`, safely in float16.

    `keras.ops.dot_product_attention` rounds the products of query and key to float16 before it
    scales them: large products become inf and then NaN, and others lose digits. Here the products
    are computed in float32, and only the result is rounded. Masked keys have no influence, however
    large the scores are. A query that may attend to no key gets zeros and zero gradients, where
    stock Keras averages over all keys.

    Args:
        query: A tensor of shape `(batch, queries, heads, depth)`.
        key: A tensor of shape `(batch, keys, key_heads, depth)`. `heads` must be a multiple of
            `key_heads`.
        value: A tensor of shape `(batch, keys, key_heads, value_depth)`.
        bias: A tensor that broadcasts to `(batch, heads, queries, keys)`, added to the scores in
            float32. A key is masked where the bias is -inf. Defaults to `None`.
        mask: A boolean tensor that broadcasts to `(batch, heads, queries, keys)`, `True` where a
            query may attend to a key. Defaults to `None`, which masks nothing.
        scale: The factor for the products. Defaults to `1 / sqrt(depth)`.
        is_causal: Whether query i attends to the keys 0 to i only. Defaults to `False`.
        flash_attention: `True` uses the backend's flash attention, which also computes scores in
            float32, and raises an error if there is none. `False` never uses it. `None` (default)
            uses it on devices that support it if there is no bias, mask or soft cap: with a mask,
            it adds the lowest float16 number, which does not hide a key whose score is as large.
        attn_logits_soft_cap: If given, each score `x` becomes `x / (1 + abs(x) / soft_cap)`.

    Returns:
        A tensor of shape `(batch, queries, heads, value_depth)` in the dtype of the inputs.

    Raises:
        ArgumentError: If an input does not have four dimensions; if the number of heads is unknown
            or not a multiple of the number of key heads; or if `scale` or
            `attn_logits_soft_cap` is not a finite number (above 0 for the latter).
        ArgumentTypeError: If `is_causal` or `flash_attention` is not a bool.

    References:
        [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)

    Example:

    >>> x = keras.ops.cast(keras.ops.full((1, 2, 1, 64), 300.0), "float16")
    >>> y = dot_product_attention(x, x, x)  # the scores before the scale are 5760000
    >>> keras.backend.standardize_dtype(y.dtype), float(keras.ops.max(y))
    ('float16', 300.0)
    """
    attend = DotProductAttention(scale, is_causal, flash_attention, attn_logits_soft_cap)
    return attend(query, key, value, bias=bias, mask=mask)


@registered
class DotProductAttention(keras.Operation):
    """The operation of `dot_product_attention`, a node in functional models.

    Args:
        scale: See `dot_product_attention`, also for the arguments below.
        is_causal: Defaults to `False`.
        flash_attention: Defaults to `None`.
        attn_logits_soft_cap: Defaults to `None`.
        **kwargs: Arguments of `keras.Operation`: `name`.

    References:
        [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)

    Example:

    >>> x = keras.ops.ones((1, 3, 2, 4), "float16")  # (batch, time, heads, depth)
    >>> y = DotProductAttention(is_causal=True)(x, x, x)
    >>> keras.backend.standardize_dtype(y.dtype), tuple(y.shape)
    ('float16', (1, 3, 2, 4))
    """

    def __init__(
        self,
        scale: float | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        flash_attention: bool | None = None,  # noqa: FBT001
        attn_logits_soft_cap: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_bool("is_causal", is_causal)
        if flash_attention is not None:
            check_bool("flash_attention", flash_attention)
        _check_number("scale", scale, above=-math.inf)
        _check_number("attn_logits_soft_cap", attn_logits_soft_cap, above=0.0)
        self.scale = scale
        self.is_causal = is_causal
        self.flash_attention = flash_attention
        self.attn_logits_soft_cap = attn_logits_soft_cap

    def call(self, query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None) -> Any:
        """Compute the attention of one batch."""
        query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
        _check_shapes(query.shape, key.shape, value.shape)
        dtype = _common_dtype(query, key, value)
        query, key, value = (ops.cast(x, dtype) for x in (query, key, value))
        if mask is not None:
            mask = ops.cast(mask, "bool")
        visible = combine(mask, causal_mask(query, key)) if self.is_causal else mask
        if self._uses_flash(query, key, value, bias, mask):
            outputs = ops.dot_product_attention(
                query,
                key,
                value,
                bias=bias,
                mask=mask,
                scale=self.scale,
                is_causal=self.is_causal,
                flash_attention=True,
                attn_logits_soft_cap=self.attn_logits_soft_cap,
            )
            return outputs if mask is None else _zero_fully_masked(outputs, visible)
        groups = query.shape[2] // key.shape[2]
        if groups > 1 and key.shape[2] > 1:  # a single key head broadcasts
            key, value = (ops.repeat(x, groups, axis=2) for x in (key, value))
        scale = 1 / math.sqrt(query.shape[3]) if self.scale is None else self.scale
        scores = attention_scores(query, key, scale)
        if self.attn_logits_soft_cap is not None:
            scores = scores / (1 + ops.abs(scores) / self.attn_logits_soft_cap)
        if bias is not None:
            bias = ops.cast(bias, scores.dtype)
            scores = scores + bias
            visible = combine(visible, bias > -math.inf)
        weights = ops.softmax(scores if visible is None else hide(scores, visible), axis=-1)
        outputs = attend(weights, value, dtype)
        # A causal mask leaves each query at least one key.
        none_hidden = mask is None and bias is None
        return outputs if none_hidden else _zero_fully_masked(outputs, visible)

    def _uses_flash(self, query: Any, key: Any, value: Any, bias: Any, mask: Any) -> bool:
        if self.flash_attention is not None:
            return self.flash_attention
        if not all(x is None for x in (bias, mask, self.attn_logits_soft_cap)):
            return False
        return bool(current().has_flash_attention(query, key, value, is_causal=self.is_causal))

    def compute_output_spec(
        self,
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,  # noqa: ARG002 - Keras passes the arguments of `call`
        mask: Any = None,  # noqa: ARG002
    ) -> Any:
        """Return the symbolic output."""
        _check_shapes(query.shape, key.shape, value.shape)
        shape = (*query.shape[:-1], value.shape[-1])
        return keras.KerasTensor(shape, dtype=_common_dtype(query, key, value))


def attention_scores(query: Any, key: Any, scale: Any) -> Any:
    """Compute the scaled products of queries and keys in float32 (float64 for float64 inputs).

    Args:
        query: A tensor of shape `(batch, queries, heads, depth)`.
        key: A tensor of shape `(batch, keys, heads, depth)`, or with one head for all queries.
        scale: The factor for the products.

    Returns:
        A tensor of shape `(batch, heads, queries, keys)`.
    """
    products = current().matmul_to_dtype(
        ops.transpose(query, _HEADS_FIRST),
        ops.transpose(key, _HEADS_FIRST_TRANSPOSED),
        upcast_dtype(query.dtype),
    )
    # Not before the product: a scaled float16 query would be rounded once more.
    return products * scale


def attend(weights: Any, value: Any, dtype: str) -> Any:
    """Average the values with the attention weights.

    The weights are not rounded to float16: with many keys they would be subnormal, and their
    gradient, a product of upstream gradients and values, may overflow.

    Args:
        weights: A float32 or float64 tensor of shape `(batch, heads, queries, keys)`.
        value: A tensor of shape `(batch, keys, heads, depth)`, or with one head for all queries.
        dtype: The dtype of the result.

    Returns:
        A tensor of shape `(batch, queries, heads, depth)`.
    """
    values = ops.cast(ops.transpose(value, _HEADS_FIRST), weights.dtype)
    # Not ops.matmul, which does not support float64 on torch.
    averages = current().matmul_to_dtype(weights, values, upcast_dtype(weights.dtype))
    return ops.transpose(ops.cast(averages, dtype), _HEADS_FIRST)


def causal_mask(query: Any, key: Any) -> Any:
    """Return a boolean mask `(queries, keys)`, True where the key is not later than the query."""
    queries, keys = ops.shape(query)[1], ops.shape(key)[1]
    return ops.expand_dims(ops.arange(queries), 1) >= ops.expand_dims(ops.arange(keys), 0)


def combine(mask: Any, other: Any) -> Any:
    """Return the logical and of two masks; the first may be None."""
    return other if mask is None else ops.logical_and(mask, other)


def _zero_fully_masked(outputs: Any, mask: Any) -> Any:
    """Set the outputs of queries to zero that may attend to no key.

    The outputs are masked and not the weights, which are larger.
    """
    any_key = ops.any(mask, axis=-1, keepdims=True)
    any_key = ops.reshape(any_key, (1,) * (_RANK - len(any_key.shape)) + tuple(ops.shape(any_key)))
    return ops.where(ops.transpose(any_key, _HEADS_FIRST), outputs, ops.zeros_like(outputs))


def _common_dtype(*tensors: Any) -> str:
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in tensors}
    # result_type() does not support float64 on JAX and torch.
    return dtypes.pop() if len(dtypes) == 1 else str(keras.backend.result_type(*dtypes))


def _check_number(name: str, value: Any, above: float) -> None:
    """Raise an error unless a setting is None, a tensor or a finite number above a limit."""
    is_other = isinstance(value, str | bytes | bool)
    if is_other or (isinstance(value, numbers.Real) and not above < float(value) < math.inf):
        raise ArgumentError(
            f"`{name}` has an invalid value.",
            received=repr(value),
            expected="a finite number" + (" above 0" if above == 0 else ""),
            fix=f"Leave out `{name}` to use the default.",
        )


def _check_shapes(query: Any, key: Any, value: Any) -> None:
    shapes = f"query {tuple(query)}, key {tuple(key)}, value {tuple(value)}"
    if not all(len(shape) == _RANK for shape in (query, key, value)):
        raise ArgumentError(
            "The inputs of attention must have four dimensions.",
            received=shapes,
            expected="(batch, time, heads, depth) for each",
            fix="Reshape the inputs. For a single head, add an axis of size 1.",
        )
    heads = (query[2], key[2], value[2])
    if None in heads or heads[1] != heads[2] or heads[0] % heads[1]:
        raise ArgumentError(
            "The query heads cannot be divided among the key heads.",
            received=shapes,
            expected="as many key heads as value heads, and a multiple of that for the query",
            fix="Change the number of heads, and give that axis a static size.",
        )
