"""Softmax and its logarithm: in float16 the sums and the mask values are too coarse."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.ops.precision import as_tensors, in_float32

# Far below every number that float16 holds, and far from the end of float32.
_MASKED = -1e30


@keras.saving.register_keras_serializable(package="kerasmp")
@in_float32
def softmax(x: Any, axis: Any = -1, mask: Any = None) -> Any:
    """Return `keras.ops.softmax`, computed in float32.

    Probabilities below 6e-5 are coarse in float16, and below 3e-8 they are 0, however they are
    computed: over many classes take float32 logits, or `kerasmp.layers.DenseHead`.

    Args:
        x: Logits of any float dtype; the result has it too.
        axis: Axis or axes over which the probabilities sum to 1; default the last.
        mask: Booleans, or numbers, that broadcast to `x`: where False, the probability is 0. Where
            a mask leaves nothing, all probabilities are 0. Default None.

    Example:

    >>> x = keras.ops.array([-40000.0, -40000.0, 9.0], "float16")
    >>> keras.ops.convert_to_numpy(softmax(x, mask=x < 9)).tolist()
    [0.5, 0.5, 0.0]
    """
    if mask is not None:
        mask = _booleans(mask)
        return ops.where(mask, softmax(ops.where(mask, x, _MASKED), axis), 0)
    return ops.softmax(x, axis=axis) if isinstance(axis, int) else ops.exp(_log(x, axis))


@keras.saving.register_keras_serializable(package="kerasmp")
@in_float32
def log_softmax(x: Any, axis: Any = -1, mask: Any = None) -> Any:
    """Return `keras.ops.log_softmax`, computed in float32.

    Args:
        x: Logits of any float dtype; the result has it too.
        axis: Axis or axes over which the probabilities sum to 1; default the last.
        mask: Booleans, or numbers, that broadcast to `x`: where False, the result is -inf, the
            logarithm of 0, and the gradient is 0. Default None.

    Example:

    >>> x = keras.ops.array([0.0, 0.0, 9.0], "float16")
    >>> keras.ops.convert_to_numpy(log_softmax(x, mask=x < 9)).round(2).tolist()
    [-0.68994140625, -0.68994140625, -inf]
    """
    if mask is not None:
        mask = _booleans(mask)
        return ops.where(mask, log_softmax(ops.where(mask, x, _MASKED), axis), -float("inf"))
    return ops.log_softmax(x, axis=axis) if isinstance(axis, int) else _log(x, axis)


def _booleans(mask: Any) -> Any:
    """Return a mask as booleans; a number counts from one half, as in Keras's Softmax layer."""
    mask = as_tensors(mask)
    is_bool = keras.backend.standardize_dtype(mask.dtype) == "bool"
    return mask if is_bool else ops.greater(mask, 0.5)


def _log(x: Any, axes: Any) -> Any:
    """Return the logarithm of the softmax over several axes.

    Keras flattens them, which fails on a TensorFlow graph with unknown sizes. The largest goes
    first: next to a logit of 60000 the sum of exponentials would be lost in float32 too.
    """
    x = x - ops.stop_gradient(ops.max(x, axis=axes, keepdims=True))
    return x - ops.logsumexp(x, axis=axes, keepdims=True)
