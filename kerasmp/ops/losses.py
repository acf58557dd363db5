"""Losses of float16 tensors, for custom training steps, `add_loss` and custom losses.

They compute in float32 and return float32 (float64 stays): a loss is scaled next, and float16 has
no room for that. Keras's own loss classes already receive float32 in a compiled model; there they
are as good. The cross-entropies are those of `keras.ops`, the others those of `keras.losses`.

What no loss can mend is a probability that was rounded to float16 before: below 3e-8 it is 0, and
the gradient of its logarithm, 1/p times the loss scale, overflows on its way back. Take logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp.docstrings import T, documented
from kerasmp.ops.precision import as_one_node, as_tensors, registered, widen
from kerasmp.ops.reductions import normalize

if TYPE_CHECKING:
    from collections.abc import Callable

_LOGITS = "Predicted probabilities or logits"
_FROM_LOGITS = "Whether `output` are logits, which is better; default False."
_MEAN = "The mean: a tensor of the shape of `y_pred` without its last axis"


def _loss(returns: str, raises: str = "", source: str = "", **args: str) -> Callable[[T], T]:
    """Return a decorator that makes a loss of a function, and completes its docstring.

    Args:
        returns: What tensor, but for its dtype.
        raises: When there is a ValueError.
        source: Where the loss comes from, if that is known.
        **args: What the arguments are: the targets and the predictions, without dtype and shape,
            and then the others.
    """
    true, pred, *_ = args
    document = documented(
        args={
            **args,
            true: f"{args[true]}, of any dtype and the shape of `{pred}`.",
            pred: f"{args[pred]}, of any float dtype.",
        },
        returns=f"{returns}; float32, or float64 if `{pred}` is.",
        raises={"ValueError": raises} if raises else "",
        references=source,
    )
    return lambda function: registered(as_one_node(document(function)))


def _wide(target: Any, output: Any) -> tuple[Any, Any]:
    """Return both in the dtype of `output`, or float32 where that is narrower."""
    output = widen(as_tensors(output))
    return ops.cast(target, output.dtype), output


@_loss(
    "A tensor of the shape of `output` without `axis`",
    "If the shapes differ.",
    target="Probabilities or one-hot classes",
    output=_LOGITS,
    from_logits=_FROM_LOGITS,
    axis="The axis of the classes; default the last.",
)
def categorical_crossentropy(
    target: Any,
    output: Any,
    from_logits: bool = False,  # noqa: FBT001, FBT002 - as in keras.ops
    axis: int = -1,
) -> Any:
    """Return `keras.ops.categorical_crossentropy`, in float32.

    Example:

    >>> logits = keras.ops.array([[60000.0, -60000.0]], "float16")
    >>> keras.ops.convert_to_numpy(categorical_crossentropy([[0, 1]], logits, True)).tolist()
    [120000.0]
    """
    target, output = _wide(target, output)
    return ops.categorical_crossentropy(target, output, from_logits=from_logits, axis=axis)


@registered
@as_one_node
def sparse_categorical_crossentropy(
    target: Any,
    output: Any,
    from_logits: bool = False,  # noqa: FBT001, FBT002
    axis: int = -1,
) -> Any:
    """Return `keras.ops.sparse_categorical_crossentropy`, in float32.

    Args:
        target: Class numbers of any integer dtype, of the shape of `output` without `axis`.
        output: Predicted probabilities or logits, of any float dtype.
        from_logits: Whether `output` are logits, which is better; default False.
        axis: The axis of the classes; default the last, the only one that TensorFlow and JAX take.

    Returns:
        A tensor of the shape of `output` without `axis`; float32, or float64 if `output` is.

    Raises:
        ValueError: If the shapes do not fit.

    Example:

    >>> logits = keras.ops.array([[60000.0, -60000.0]], "float16")
    >>> keras.ops.convert_to_numpy(sparse_categorical_crossentropy([1], logits, True)).tolist()
    [120000.0]
    """
    return ops.sparse_categorical_crossentropy(
        target, widen(as_tensors(output)), from_logits=from_logits, axis=axis
    )


@_loss(
    "A tensor of the shape of `output`, not averaged, as in `keras.ops`",
    "If the shapes differ.",
    target="Labels or probabilities",
    output=_LOGITS,
    from_logits=_FROM_LOGITS,
)
def binary_crossentropy(
    target: Any,
    output: Any,
    from_logits: bool = False,  # noqa: FBT001, FBT002
) -> Any:
    """Return `keras.ops.binary_crossentropy`, in float32.

    Example:

    >>> p = keras.ops.array([0.5, 1.0], "float16")  # log(1 - 1) is no number in float16
    >>> keras.ops.convert_to_numpy(binary_crossentropy([1, 1], p)).round(3).tolist()
    [0.693..., 0.0]
    """
    target, output = _wide(target, output)
    return ops.binary_crossentropy(target, output, from_logits=from_logits)


_FOCAL = {
    "y_pred": _LOGITS,
    "**kwargs": "As for Keras: `gamma`, `from_logits`, `axis` and so on.",
    "source": "[Lin et al., 2017](https://arxiv.org/abs/1708.02002)",
}
_WITHOUT_IT = "over the last axis, or over `axis`: a tensor of the shape of `y_pred` without it"


@_loss(f"The mean {_WITHOUT_IT}", "If the shapes differ.", y_true="Labels", **_FOCAL)
def binary_focal_crossentropy(y_true: Any, y_pred: Any, **kwargs: Any) -> Any:
    """Return `keras.losses.binary_focal_crossentropy`, in float32.

    Example:

    >>> p = keras.ops.array([[1.0]], "float16")
    >>> keras.ops.convert_to_numpy(binary_focal_crossentropy([[1]], p)).round(3).tolist()
    [0.0]
    """
    return keras.losses.binary_focal_crossentropy(*_wide(y_true, y_pred), **kwargs)


@_loss(f"The sum {_WITHOUT_IT}", y_true="One-hot classes", **_FOCAL)
def categorical_focal_crossentropy(y_true: Any, y_pred: Any, **kwargs: Any) -> Any:
    """Return `keras.losses.categorical_focal_crossentropy`, in float32.

    Example:

    >>> p = keras.ops.array([[1.0, 0.0]], "float16")
    >>> keras.ops.convert_to_numpy(categorical_focal_crossentropy([[1, 0]], p)).round(3).tolist()
    [0.0]
    """
    return keras.losses.categorical_focal_crossentropy(*_wide(y_true, y_pred), **kwargs)


@_loss(_MEAN.replace("mean", "sum"), y_true="Probabilities", y_pred="Predicted probabilities")
def kl_divergence(y_true: Any, y_pred: Any) -> Any:
    """Return `keras.losses.kl_divergence` over the last axis, in float32.

    Example:

    >>> p = keras.ops.array([[0.5, 0.5, 0.0]], "float16")
    >>> keras.ops.convert_to_numpy(kl_divergence(p, p)).tolist()
    [0.0]
    """
    return keras.losses.kl_divergence(*_wide(y_true, y_pred))


@_loss(_MEAN, y_true="Counts", y_pred="Predicted rates")
def poisson(y_true: Any, y_pred: Any) -> Any:
    """Return `keras.losses.poisson` over the last axis, in float32.

    Example:

    >>> keras.ops.convert_to_numpy(poisson([[0.0]], keras.ops.array([[2.0]], "float16"))).tolist()
    [2.0]
    """
    return keras.losses.poisson(*_wide(y_true, y_pred))


@_loss(_MEAN, y_true="Targets", y_pred="Predictions")
def mean_squared_error(y_true: Any, y_pred: Any) -> Any:
    """Return `keras.losses.mean_squared_error` over the last axis, in float32.

    Example:

    >>> y = keras.ops.array([[500.0]], "float16")  # 500² is inf in float16
    >>> keras.ops.convert_to_numpy(mean_squared_error([[0.0]], y)).tolist()
    [250000.0]
    """
    return keras.losses.mean_squared_error(*_wide(y_true, y_pred))


@_loss(_MEAN.replace("mean", "mean, in percent"), y_true="Targets", y_pred="Predictions")
def mean_absolute_percentage_error(y_true: Any, y_pred: Any) -> Any:
    """Return `keras.losses.mean_absolute_percentage_error` over the last axis, in float32.

    Example:

    >>> y = keras.ops.array([[1001.0]], "float16")  # 100 times it is inf in float16
    >>> keras.ops.convert_to_numpy(mean_absolute_percentage_error([[1.0]], y)).tolist()
    [100000.0]
    """
    return keras.losses.mean_absolute_percentage_error(*_wide(y_true, y_pred))


@_loss(
    _MEAN.replace("mean", "mean, on torch always in float32"),
    y_true="Labels, -1 and 1 or 0 and 1",
    y_pred="Predictions",
)
def squared_hinge(y_true: Any, y_pred: Any) -> Any:
    """Return `keras.losses.squared_hinge` over the last axis, in float32.

    Example:

    >>> y = keras.ops.array([[-499.0]], "float16")  # 500² is inf in float16
    >>> keras.ops.convert_to_numpy(squared_hinge([[1.0]], y)).tolist()
    [250000.0]
    """
    return keras.losses.squared_hinge(*_wide(y_true, y_pred))


@_loss(
    "A tensor of the shape of `y_pred` without `axis`",
    y_true="Vectors",
    y_pred="Vectors",
    axis="The axis of the vectors; default the last.",
)
def cosine_similarity(y_true: Any, y_pred: Any, axis: int = -1) -> Any:
    """Return `keras.losses.cosine_similarity`, in float32: from -1, for equal directions, to 1.

    The similarity to a zero vector is 0, and so is its gradient, not NaN.

    Example:

    >>> x = keras.ops.array([[300.0, 0.0]], "float16")  # 300² is inf in float16
    >>> keras.ops.convert_to_numpy(cosine_similarity(x, x)).round(3).tolist()
    [-1.0]
    """
    target, output = _wide(y_true, y_pred)
    return -ops.sum(normalize(target, axis=axis) * normalize(output, axis=axis), axis=axis)
