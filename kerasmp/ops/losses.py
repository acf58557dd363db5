"""Losses for float16 tensors, to use in custom training steps, in `add_loss` and in custom losses.

They compute in float32 and return float32 (float64 for float64 predictions), because the loss is
then multiplied by the loss scale, which would overflow in float16. In a compiled model Keras's loss
classes receive float32 and work as well. The cross-entropies follow `keras.ops`, and the other
losses follow `keras.losses`.

No loss can repair a probability that was already rounded to float16: below 3e-8 it is 0, and the
gradient of its logarithm, 1/p times the loss scale, overflows in the backward pass. Use logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp.docstrings import T, documented
from kerasmp.ops.precision import as_one_node, as_tensors, registered, upcast
from kerasmp.ops.reductions import normalize

if TYPE_CHECKING:
    from collections.abc import Callable

_LOGITS = "Predicted probabilities or logits"
_FROM_LOGITS = "Whether `output` contains logits, which are more accurate. Defaults to `False`."
_MEAN = "The mean over the last axis: a tensor of the shape of `y_pred` without it"


def _loss(returns: str, raises: str = "", source: str = "", **args: str) -> Callable[[T], T]:
    """Return a decorator that registers a loss and completes its docstring.

    Args:
        returns: The description of the result without its dtype.
        raises: When the function raises a ValueError.
        source: The paper that introduced the loss, if any.
        **args: The descriptions of the arguments, starting with the targets and the predictions,
            whose shape and dtype are added.
    """
    targets, predictions, *_ = args
    document = documented(
        args={
            **args,
            targets: f"{args[targets]}, of any dtype and the shape of `{predictions}`.",
            predictions: f"{args[predictions]}, of any float dtype.",
        },
        returns=f"{returns}, in float32, or in float64 if `{predictions}` is float64.",
        raises={"ValueError": raises} if raises else "",
        references=source,
    )
    return lambda function: registered(as_one_node(document(function)))


def _upcast_both(target: Any, output: Any) -> tuple[Any, Any]:
    """Cast both to float32, or to float64 if `output` is float64."""
    output = upcast(as_tensors(output))
    return ops.cast(target, output.dtype), output


@_loss(
    "A tensor of the shape of `output` without `axis`",
    "If the shapes differ.",
    target="Probabilities or one-hot classes",
    output=_LOGITS,
    from_logits=_FROM_LOGITS,
    axis="The axis of the classes. Defaults to the last axis.",
)
def categorical_crossentropy(
    target: Any,
    output: Any,
    from_logits: bool = False,  # noqa: FBT001, FBT002 - Keras's signature
    axis: int = -1,
) -> Any:
    """Compute `keras.ops.categorical_crossentropy` in float32.

    Example:

    >>> logits = keras.ops.array([[60000.0, -60000.0]], "float16")
    >>> keras.ops.convert_to_numpy(categorical_crossentropy([[0, 1]], logits, True)).tolist()
    [120000.0]
    """
    target, output = _upcast_both(target, output)
    return ops.categorical_crossentropy(target, output, from_logits=from_logits, axis=axis)


@registered
@as_one_node
def sparse_categorical_crossentropy(
    target: Any,
    output: Any,
    from_logits: bool = False,  # noqa: FBT001, FBT002
    axis: int = -1,
) -> Any:
    """Compute `keras.ops.sparse_categorical_crossentropy` in float32.

    Args:
        target: Class indices of any integer dtype, of the shape of `output` without `axis`.
        output: Predicted probabilities or logits, of any float dtype.
        from_logits: Whether `output` contains logits, which are more accurate. Defaults to `False`.
        axis: The axis of the classes. Defaults to the last axis, the only one that TensorFlow and
            JAX support.

    Returns:
        A tensor of the shape of `output` without `axis`, in float32, or in float64 if `output` is
        float64.

    Raises:
        ValueError: If the shapes do not match.

    Example:

    >>> logits = keras.ops.array([[60000.0, -60000.0]], "float16")
    >>> keras.ops.convert_to_numpy(sparse_categorical_crossentropy([1], logits, True)).tolist()
    [120000.0]
    """
    return ops.sparse_categorical_crossentropy(
        target, upcast(as_tensors(output)), from_logits=from_logits, axis=axis
    )


@_loss(
    "A tensor of the shape of `output`, not averaged, as in `keras.ops`",
    "If the shapes differ.",
    target="Labels or probabilities",
    output=_LOGITS,
    from_logits=_FROM_LOGITS,
)
def binary_crossentropy(target: Any, output: Any, from_logits: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Compute `keras.ops.binary_crossentropy` in float32.

    Example:

    >>> p = keras.ops.array([0.5, 1.0], "float16")  # log(1 - 1) is -inf in float16
    >>> keras.ops.convert_to_numpy(binary_crossentropy([1, 1], p)).round(3).tolist()
    [0.693..., 0.0]
    """
    target, output = _upcast_both(target, output)
    return ops.binary_crossentropy(target, output, from_logits=from_logits)


_FOCAL = {
    "y_pred": _LOGITS,
    "**kwargs": "Other arguments of Keras's loss, such as `gamma`, `from_logits` and `axis`.",
    "source": "[Lin et al., 2017](https://arxiv.org/abs/1708.02002)",
}
_OVER_AXIS = "over `axis`, the last by default: a tensor of the shape of `y_pred` without it"


@_loss(f"The mean {_OVER_AXIS}", "If the shapes differ.", y_true="Labels", **_FOCAL)
def binary_focal_crossentropy(y_true: Any, y_pred: Any, **kwargs: Any) -> Any:
    """Compute `keras.losses.binary_focal_crossentropy` in float32.

    Example:

    >>> p = keras.ops.array([[1.0]], "float16")
    >>> keras.ops.convert_to_numpy(binary_focal_crossentropy([[1]], p)).round(3).tolist()
    [0.0]
    """
    return keras.losses.binary_focal_crossentropy(*_upcast_both(y_true, y_pred), **kwargs)


@_loss(f"The sum {_OVER_AXIS}", y_true="One-hot classes", **_FOCAL)
def categorical_focal_crossentropy(y_true: Any, y_pred: Any, **kwargs: Any) -> Any:
    """Compute `keras.losses.categorical_focal_crossentropy` in float32.

    Example:

    >>> p = keras.ops.array([[1.0, 0.0]], "float16")
    >>> keras.ops.convert_to_numpy(categorical_focal_crossentropy([[1, 0]], p)).round(3).tolist()
    [0.0]
    """
    return keras.losses.categorical_focal_crossentropy(*_upcast_both(y_true, y_pred), **kwargs)


@_loss(_MEAN.replace("mean", "sum"), y_true="Probabilities", y_pred="Predicted probabilities")
def kl_divergence(y_true: Any, y_pred: Any) -> Any:
    """Compute `keras.losses.kl_divergence` in float32.

    Example:

    >>> p = keras.ops.array([[0.5, 0.5, 0.0]], "float16")
    >>> keras.ops.convert_to_numpy(kl_divergence(p, p)).tolist()
    [0.0]
    """
    return keras.losses.kl_divergence(*_upcast_both(y_true, y_pred))


@_loss(_MEAN, y_true="Counts", y_pred="Predicted rates")
def poisson(y_true: Any, y_pred: Any) -> Any:
    """Compute `keras.losses.poisson` in float32.

    Example:

    >>> keras.ops.convert_to_numpy(poisson([[0.0]], keras.ops.array([[2.0]], "float16"))).tolist()
    [2.0]
    """
    return keras.losses.poisson(*_upcast_both(y_true, y_pred))


@_loss(_MEAN, y_true="Targets", y_pred="Predictions")
def mean_squared_error(y_true: Any, y_pred: Any) -> Any:
    """Compute `keras.losses.mean_squared_error` in float32.

    Example:

    >>> y = keras.ops.array([[500.0]], "float16")  # 500² is inf in float16
    >>> keras.ops.convert_to_numpy(mean_squared_error([[0.0]], y)).tolist()
    [250000.0]
    """
    return keras.losses.mean_squared_error(*_upcast_both(y_true, y_pred))


@_loss(_MEAN.replace("mean", "mean in percent"), y_true="Targets", y_pred="Predictions")
def mean_absolute_percentage_error(y_true: Any, y_pred: Any) -> Any:
    """Compute `keras.losses.mean_absolute_percentage_error` in float32.

    Example:

    >>> y = keras.ops.array([[1001.0]], "float16")  # 100 times 1000 is inf in float16
    >>> keras.ops.convert_to_numpy(mean_absolute_percentage_error([[1.0]], y)).tolist()
    [100000.0]
    """
    return keras.losses.mean_absolute_percentage_error(*_upcast_both(y_true, y_pred))


@_loss(_MEAN, y_true="Labels, -1 and 1 or 0 and 1", y_pred="Predictions")
def squared_hinge(y_true: Any, y_pred: Any) -> Any:
    """Compute `keras.losses.squared_hinge` in float32.

    On torch the result is float32 for float64 predictions too.

    Example:

    >>> y = keras.ops.array([[-499.0]], "float16")  # 500² is inf in float16
    >>> keras.ops.convert_to_numpy(squared_hinge([[1.0]], y)).tolist()
    [250000.0]
    """
    return keras.losses.squared_hinge(*_upcast_both(y_true, y_pred))


@_loss(
    "A tensor of the shape of `y_pred` without `axis`",
    y_true="Vectors",
    y_pred="Vectors",
    axis="The axis of the vectors. Defaults to the last axis.",
)
def cosine_similarity(y_true: Any, y_pred: Any, axis: int = -1) -> Any:
    """Compute `keras.losses.cosine_similarity` in float32: -1 for equal directions, 1 for opposite.

    For a zero vector the similarity is 0, and the gradient is 0 instead of NaN.

    Example:

    >>> x = keras.ops.array([[300.0, 0.0]], "float16")  # 300² is inf in float16
    >>> keras.ops.convert_to_numpy(cosine_similarity(x, x)).round(3).tolist()
    [-1.0]
    """
    target, output = _upcast_both(y_true, y_pred)
    return -ops.sum(normalize(target, axis=axis) * normalize(output, axis=axis), axis=axis)
