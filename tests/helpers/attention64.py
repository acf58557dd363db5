"""Dot-product attention and its gradients in NumPy's float64."""

import numpy as np


def softmax(scores, mask=None):
    """Return weights over the last axis; zeros where the mask hides all of them."""
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    powers = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = powers.sum(-1, keepdims=True)
    return np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)


def attention(query, key, value, upstream, *, scale, mask=None, bias=0.0):
    """Return outputs, weights, and gradients of query, key, value: (batch, time, heads, depth)."""
    scores = np.einsum("btnh,bsnh->bnts", query, key) * scale + bias
    weights = softmax(scores, mask)
    outputs = np.einsum("bnts,bsnh->btnh", weights, value)
    to_value = np.einsum("bnts,btnh->bsnh", weights, upstream)
    to_weights = np.einsum("btnh,bsnh->bnts", upstream, value)
    to_scores = softmax_gradient(weights, to_weights) * scale
    to_query = np.einsum("bnts,bsnh->btnh", to_scores, key)
    to_key = np.einsum("bnts,btnh->bsnh", to_scores, query)
    return outputs, weights, [to_query, to_key, to_value]


def softmax_gradient(weights, upstream):
    return weights * (upstream - (weights * upstream).sum(-1, keepdims=True))
