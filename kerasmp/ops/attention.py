"""Attention whose scores and softmax are float32, whatever comes in and goes out."""

from __future__ import annotations

import math
import numbers
from typing import Any

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.errors import ArgumentError, check_bool
from kerasmp.ops.precision import accumulation_dtype, registered
from kerasmp.ops.softmax import hide

# Heads stand third in the inputs and second in what is multiplied: (batch, heads, time, depth).
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
    flash_attention: bool | None = None,  # noqa: FBT001 - Keras's signature
    attn_logits_soft_cap: float | None = None,
) -> Any:
    """Return `softmax(query @ key * scale + bias) @ value`, safe in float16.

    `keras.ops.dot_product_attention` rounds the products of query and key to float16 before it
    scales them: large ones become inf, and then NaN, others lose digits. Here the products of
    float16 numbers come out in float32 and stay so until the result is rounded, once. Masked keys
    have no influence, however large the scores, and a query that may see no key at all gets zeros
    and gives zero gradients; stock Keras averages over all keys there.

    Args:
        query: Shape `(batch, queries, heads, depth)`.
        key: Shape `(batch, keys, key_heads, depth)`; `heads` must be a multiple of `key_heads`.
        value: Shape `(batch, keys, key_heads, value_depth)`.
        bias: Added to the scores, in float32; broadcasts to `(batch, heads, queries, keys)`.
            Where it is -inf, the key is masked. Default None.
        mask: True where a query may see a key; broadcasts to `(batch, heads, queries, keys)`.
            Default None: everywhere.
        scale: What the products are multiplied by; default None is `1 / sqrt(depth)`.
        is_causal: Whether query number i sees keys 0 to i only. Default False.
        flash_attention: True uses the backend's flash attention, which computes its scores in
            float32 too, or raises; False does not; default None uses it on devices that have it
            if there is no bias, mask or soft cap. (With a mask it adds the lowest float16 number,
            which does not hide keys from scores of that size.)
        attn_logits_soft_cap: If given, a score x becomes `x / (1 + abs(x) / soft_cap)`.

    Returns:
        Tensor of shape `(batch, queries, heads, value_depth)` in the dtype of the inputs.

    Raises:
        ArgumentError: If an input does not have four dimensions, or heads do not divide or have no
            static number, or `scale` or the soft cap is no such number.
        ArgumentTypeError: If a switch is no bool.

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
    """`dot_product_attention` as the node of a functional model that Keras makes of it.

    Args:
        scale: See `dot_product_attention`, also for the others.
        is_causal: Default False.
        flash_attention: Default None.
        attn_logits_soft_cap: Default None.
        **kwargs: As for `keras.Operation`: `name`.

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
        is_causal: bool = False,  # noqa: FBT001, FBT002 - as in the function
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
        """Compute what the function returns."""
        query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
        _check_shapes(query.shape, key.shape, value.shape)
        dtype = _common_dtype(query, key, value)
        query, key, value = (ops.cast(x, dtype) for x in (query, key, value))
        if mask is not None:
            mask = ops.cast(mask, "bool")
        seen = both(mask, causal_mask(query, key)) if self.is_causal else mask
        if self._flash(query, key, value, bias, mask):
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
            return outputs if mask is None else _zero_where_all_masked(outputs, seen)
        groups = query.shape[2] // key.shape[2]
        if groups > 1 and key.shape[2] > 1:  # a single head of keys broadcasts by itself
            key, value = (ops.repeat(x, groups, axis=2) for x in (key, value))
        scale = 1 / math.sqrt(query.shape[3]) if self.scale is None else self.scale
        scores = attention_scores(query, key, scale)
        if self.attn_logits_soft_cap is not None:
            scores = scores / (1 + ops.abs(scores) / self.attn_logits_soft_cap)
        if bias is not None:
            bias = ops.cast(bias, scores.dtype)
            scores = scores + bias
            seen = both(seen, bias > -math.inf)
        weights = ops.softmax(scores if seen is None else hide(scores, seen), axis=-1)
        outputs = attend(weights, value, dtype)
        # Causality alone hides no row as a whole.
        none_hidden = mask is None and bias is None
        return outputs if none_hidden else _zero_where_all_masked(outputs, seen)

    def _flash(self, query: Any, key: Any, value: Any, bias: Any, mask: Any) -> bool:
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
        bias: Any = None,  # noqa: ARG002 - Keras passes what it passes to call
        mask: Any = None,  # noqa: ARG002
    ) -> Any:
        """Return the symbolic result."""
        _check_shapes(query.shape, key.shape, value.shape)
        shape = (*query.shape[:-1], value.shape[-1])
        return keras.KerasTensor(shape, dtype=_common_dtype(query, key, value))


def attention_scores(query: Any, key: Any, scale: Any) -> Any:
    """Return the scaled products of queries and keys, at least in float32.

    Args:
        query: Shape `(batch, queries, heads, depth)`.
        key: Shape `(batch, keys, heads, depth)`, or 1 head for all.
        scale: A number.

    Returns:
        Tensor of shape `(batch, heads, queries, keys)`.
    """
    products = current().matmul_to_dtype(
        ops.transpose(query, _HEADS_FIRST),
        ops.transpose(key, _HEADS_FIRST_TRANSPOSED),
        accumulation_dtype(query.dtype),
    )
    # Afterwards: a scaled float16 query would be rounded once more.
    return products * scale


def attend(weights: Any, value: Any, dtype: str) -> Any:
    """Return the values averaged by the weights.

    The weights are not rounded to float16: with many keys they are subnormal there, and their
    gradient, a product of upstream gradients and values, may not fit.

    Args:
        weights: Shape `(batch, heads, queries, keys)`, at least float32.
        value: Shape `(batch, keys, heads, depth)`, or 1 head for all.
        dtype: That of the result.

    Returns:
        Tensor of shape `(batch, queries, heads, depth)`.
    """
    values = ops.cast(ops.transpose(value, _HEADS_FIRST), weights.dtype)
    # Not ops.matmul, which knows no float64 on torch.
    averages = current().matmul_to_dtype(weights, values, accumulation_dtype(weights.dtype))
    return ops.transpose(ops.cast(averages, dtype), _HEADS_FIRST)


def causal_mask(query: Any, key: Any) -> Any:
    """Return the bool mask `(queries, keys)`, True where no key is later than its query."""
    queries, keys = ops.shape(query)[1], ops.shape(key)[1]
    return ops.expand_dims(ops.arange(queries), 1) >= ops.expand_dims(ops.arange(keys), 0)


def both(mask: Any, other: Any) -> Any:
    """Return where both masks are True; the first may be None."""
    return other if mask is None else ops.logical_and(mask, other)


def _zero_where_all_masked(outputs: Any, mask: Any) -> Any:
    # Over the outputs and not over the weights, of which there are more.
    seeing = ops.any(mask, axis=-1, keepdims=True)
    seeing = ops.reshape(seeing, (1,) * (_RANK - len(seeing.shape)) + tuple(ops.shape(seeing)))
    return ops.where(ops.transpose(seeing, _HEADS_FIRST), outputs, ops.zeros_like(outputs))


def _common_dtype(*tensors: Any) -> str:
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in tensors}
    # result_type() knows no float64 on JAX and torch.
    return dtypes.pop() if len(dtypes) == 1 else str(keras.backend.result_type(*dtypes))


def _check_number(name: str, value: Any, above: float) -> None:
    """Raise for a number that makes no scores; a tensor may come, too."""
    is_text = isinstance(value, str | bytes | bool)
    if is_text or (isinstance(value, numbers.Real) and not above < float(value) < math.inf):
        raise ArgumentError(
            f"`{name}` cannot be used.",
            received=repr(value),
            expected="a finite number" + (" above 0" if above == 0 else ""),
            fix="None is the default.",
        )


def _check_shapes(query: Any, key: Any, value: Any) -> None:
    shapes = f"query {tuple(query)}, key {tuple(key)}, value {tuple(value)}"
    if not all(len(shape) == _RANK for shape in (query, key, value)):
        raise ArgumentError(
            "Attention needs four dimensions.",
            received=shapes,
            expected="(batch, time, heads, depth) three times",
            fix="Reshape the inputs; one head is an axis of size 1.",
        )
    heads = (query[2], key[2], value[2])
    if None in heads or heads[1] != heads[2] or heads[0] % heads[1]:
        raise ArgumentError(
            "The heads of the queries cannot be shared out among those of the keys.",
            received=shapes,
            expected="as many heads of keys as of values, and a multiple of them in the query",
            fix="Choose numbers of heads that divide, and give that axis a static size.",
        )
