"""Softmax and log-softmax, whose sums and mask values are too coarse in float16."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.ops.precision import as_tensors, in_float32, registered

# Far below every score of float16 inputs (at most 65504 ** 2 * depth), but finite, so that a fully
# masked row gives no NaN.
_MASKED = -1e38


@registered
@in_float32
def softmax(x: Any, axis: Any = -1, mask: Any = None) -> Any:
    """Compute `keras.ops.softmax` in float32.

    However they are computed, probabilities below 6e-5 are coarse in float16, and below 3e-8 they
    are 0. For many classes, use float32 logits or `kerasmp.layers.DenseHead`.

    Args:
        x: Logits of any float dtype and any shape of rank 1 or more.
        axis: The axis or axes over which the probabilities sum to 1. Defaults to the last axis.
        mask: Booleans or numbers that broadcast to `x`. Where the mask is `False`, the probability
            is 0; in a fully masked row all probabilities are 0. Defaults to `None`.

    Returns:
        A tensor of the same shape and dtype as `x`.

    References:
        [Blanchard et al., 2021](https://arxiv.org/abs/1909.03469)

    Example:

    >>> x = keras.ops.array([-40000.0, -40000.0, 9.0], "float16")
    >>> keras.ops.convert_to_numpy(softmax(x, mask=x < 9)).tolist()
    [0.5, 0.5, 0.0]
    """
    return masked_softmax(x, None if mask is None else _as_bool(mask), axis)


@registered
@in_float32
def log_softmax(x: Any, axis: Any = -1, mask: Any = None) -> Any:
    """Compute `keras.ops.log_softmax` in float32.

    Args:
        x: Logits of any float dtype and any shape of rank 1 or more.
        axis: The axis or axes over which the probabilities sum to 1. Defaults to the last axis.
        mask: Booleans or numbers that broadcast to `x`. Where the mask is `False`, the result is
            -inf, the logarithm of 0, and the gradient is 0. Defaults to `None`.

    Returns:
        A tensor of the same shape and dtype as `x`.

    References:
        [Blanchard et al., 2021](https://arxiv.org/abs/1909.03469)

    Example:

    >>> x = keras.ops.array([0.0, 0.0, 9.0], "float16")
    >>> keras.ops.convert_to_numpy(log_softmax(x, mask=x < 9)).round(2).tolist()
    [-0.68994140625, -0.68994140625, -inf]
    """
    if mask is None:
        return _log_softmax(x, axis)
    mask = _as_bool(mask)
    return ops.where(mask, _log_softmax(hide(x, mask), axis), -float("inf"))


def masked_softmax(scores: Any, mask: Any, axis: Any = -1) -> Any:
    """Compute a softmax that is 0 where the mask is False, even in a fully masked row.

    Args:
        scores: A float32 or float64 tensor.
        mask: A boolean tensor that broadcasts to the scores, or None.
        axis: The axis or axes over which the weights sum to 1.
    """
    visible = scores if mask is None else hide(scores, mask)
    if isinstance(axis, int):
        weights = ops.softmax(visible, axis=axis)
    else:
        weights = ops.exp(_log_softmax(visible, axis))
    return weights if mask is None else ops.where(mask, weights, ops.zeros_like(weights))


def hide(scores: Any, mask: Any) -> Any:
    """Replace the scores where the mask is False by a number below every other score."""
    return ops.where(mask, scores, ops.cast(_MASKED, scores.dtype))


def _as_bool(mask: Any) -> Any:
    """Convert a mask to booleans: numbers above 0.5 are True, as in Keras's Softmax layer."""
    mask = as_tensors(mask)
    is_bool = keras.backend.standardize_dtype(mask.dtype) == "bool"
    return mask if is_bool else ops.greater(mask, 0.5)


def _log_softmax(x: Any, axis: Any) -> Any:
    """Compute the log-softmax over one or more axes.

    For several axes Keras flattens them, which fails in a TensorFlow graph with unknown sizes. The
    maximum is subtracted first: next to a logit of 60000, the logarithm of the sum of exponentials
    would be lost even in float32.
    """
    if isinstance(axis, int):
        return ops.log_softmax(x, axis=axis)
    x = x - ops.stop_gradient(ops.max(x, axis=axis, keepdims=True))
    return x - ops.logsumexp(x, axis=axis, keepdims=True)
