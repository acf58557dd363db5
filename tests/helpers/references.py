"""Exact results to compare with: functions and their gradients in NumPy's float64."""

import numpy as np


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def softmax(x, axis=-1, mask=None):
    """Return the softmax; zeros where the mask hides a whole row."""
    if mask is not None:
        x = np.where(mask, x, -np.inf)
    top = x.max(axis, keepdims=True)
    e = np.exp(x - np.where(np.isfinite(top), top, 0.0))
    total = e.sum(axis, keepdims=True)
    return np.divide(e, total, out=np.zeros_like(e), where=total > 0)


def softmax_gradient(p, dy, axis=-1):
    """Return the gradient of the logits, given the softmax and the gradient of its output."""
    # Shifting the upstream gradient by a constant changes only the rounding.
    dy = dy - dy.max(axis, keepdims=True)
    return p * (dy - (p * dy).sum(axis, keepdims=True))


def log_softmax(x, axis=-1):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def length(x):
    return np.sqrt((x * x).sum(-1, keepdims=True))


def normalize(x):
    return x / np.where(length(x) == 0, 1, length(x))


def normalize_gradient(x, dy):
    y, norm = normalize(x), length(x)
    gradient = (dy - y * (y * dy).sum(-1, keepdims=True)) / np.where(norm == 0, 1, norm)
    return np.where(norm == 0, 0, gradient)


def attention(query, key, value, upstream, *, scale, mask=None, bias=0.0):
    """Return outputs, weights and the gradients of query, key and value.

    The shape of the inputs is (batch, time, heads, depth).
    """
    scores = np.einsum("btnh,bsnh->bnts", query, key) * scale + bias
    weights = softmax(scores, mask=mask)
    outputs = np.einsum("bnts,bsnh->btnh", weights, value)
    to_value = np.einsum("bnts,btnh->bsnh", weights, upstream)
    to_weights = np.einsum("btnh,bsnh->bnts", upstream, value)
    to_scores = softmax_gradient(weights, to_weights) * scale
    to_query = np.einsum("bnts,bsnh->btnh", to_scores, key)
    to_key = np.einsum("bnts,btnh->bsnh", to_scores, query)
    return outputs, weights, [to_query, to_key, to_value]
