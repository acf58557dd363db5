"""Softmax and its logarithm: in float16 the sums and the mask values are too coarse."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.ops.precision import as_tensors, in_float32, registered

# Far below every score of float16 inputs (at most 65504 ** 2 * depth), and finite, so that a row
# of nothing else gives no NaN.
_MASKED = -1e38


@registered
@in_float32
def softmax(x: Any, axis: Any = -1, mask: Any = None) -> Any:
    """Return `keras.ops.softmax`, computed in float32.

    Probabilities below 6e-5 are coarse in float16, and below 3e-8 they are 0, however they are
    computed: over many classes take float32 logits, or `kerasmp.layers.DenseHead`.

    Args:
        x: Logits of any shape with an axis, and any float dtype; the result has both.
        axis: Axis or axes over which the probabilities sum to 1; default the last.
        mask: Booleans, or numbers, that broadcast to `x`: where False, the probability is 0. Where
            a mask leaves nothing, all probabilities are 0. Default None.

    References:
        [Blanchard et al., 2021](https://arxiv.org/abs/1909.03469)

    Example:

    >>> x = keras.ops.array([-40000.0, -40000.0, 9.0], "float16")
    >>> keras.ops.convert_to_numpy(softmax(x, mask=x < 9)).tolist()
    [0.5, 0.5, 0.0]
    """
    if mask is not None:
        mask = _booleans(mask)
    return masked_softmax(x, mask, axis)


@registered
@in_float32
def log_softmax(x: Any, axis: Any = -1, mask: Any = None) -> Any:
    """Return `keras.ops.log_softmax`, computed in float32.

    Args:
        x: Logits of any shape with an axis, and any float dtype; the result has both.
        axis: Axis or axes over which the probabilities sum to 1; default the last.
        mask: Booleans, or numbers, that broadcast to `x`: where False, the result is -inf, the
            logarithm of 0, and the gradient is 0. Default None.

    References:
        [Blanchard et al., 2021](https://arxiv.org/abs/1909.03469)

    Example:

    >>> x = keras.ops.array([0.0, 0.0, 9.0], "float16")
    >>> keras.ops.convert_to_numpy(log_softmax(x, mask=x < 9)).round(2).tolist()
    [-0.68994140625, -0.68994140625, -inf]
    """
    if mask is not None:
        mask = _booleans(mask)
        return ops.where(mask, _log_softmax(hide(x, mask), axis), -float("inf"))
    return _log_softmax(x, axis)


def masked_softmax(scores: Any, mask: Any, axis: Any = -1) -> Any:
    """Return weights that are 0 where the mask is False, also where a whole row is.

    Args:
        scores: At least float32.
        mask: Bool, broadcasts to the scores; or None.
        axis: One axis or several over which the weights add up to 1.
    """
    seen = scores if mask is None else hide(scores, mask)
    one = isinstance(axis, int)
    weights = ops.softmax(seen, axis=axis) if one else ops.exp(_log_softmax(seen, axis))
    return weights if mask is None else ops.where(mask, weights, ops.zeros_like(weights))


def hide(scores: Any, mask: Any) -> Any:
    """Return the scores with a number below all of them where the mask is False."""
    return ops.where(mask, scores, ops.cast(_MASKED, scores.dtype))


def _booleans(mask: Any) -> Any:
    """Return a mask as booleans; a number counts from one half, as in Keras's Softmax layer."""
    mask = as_tensors(mask)
    is_bool = keras.backend.standardize_dtype(mask.dtype) == "bool"
    return mask if is_bool else ops.greater(mask, 0.5)


def _log_softmax(x: Any, axis: Any) -> Any:
    """Return the logarithm of the softmax over an axis or several.

    Keras flattens several, which fails on a TensorFlow graph with unknown sizes. The largest goes
    first: next to a logit of 60000 the sum of exponentials would be lost in float32 too.
    """
    if isinstance(axis, int):
        return ops.log_softmax(x, axis=axis)
    x = x - ops.stop_gradient(ops.max(x, axis=axis, keepdims=True))
    return x - ops.logsumexp(x, axis=axis, keepdims=True)
