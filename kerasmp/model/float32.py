"""What losses and metrics are given: predictions and extra losses in float32."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_private import flatten_layers, with_mask_of
from kerasmp.model.hints import dtype_hints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Keras passes x, y, y_pred in this order to compute_loss and to compute_metrics.
_Y_PRED = 2


def at_least_float32(tensor: Any) -> Any:
    """Return a float16 or bfloat16 tensor in float32, any other as it is."""
    dtype = getattr(tensor, "dtype", None)
    if dtype is None or keras.backend.standardize_dtype(dtype) not in {"float16", "bfloat16"}:
        return tensor
    return cast(tensor, "float32")


def cast(tensor: Any, dtype: str) -> Any:
    """Return a float tensor in another dtype, with its mask, and any other as it is."""
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
        return tensor
    return with_mask_of(tensor, keras.ops.cast(tensor, dtype))


def float32_predictions(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `compute_loss` or `compute_metrics`, given its `y_pred` in at least float32.

    Args:
        method: That of a model of ours, of a mixin or of a user's subclass.
    """

    @functools.wraps(method)
    def with_float32(model: Any, *args: Any, **kwargs: Any) -> Any:
        if "y_pred" in kwargs:
            kwargs["y_pred"] = _all_at_least_float32(kwargs["y_pred"])
        elif len(args) > _Y_PRED:
            before, after = args[:_Y_PRED], args[_Y_PRED + 1 :]
            args = (*before, _all_at_least_float32(args[_Y_PRED]), *after)
        with dtype_hints():
            return method(model, *args, **kwargs)

    return with_float32


def _all_at_least_float32(tensors: Any) -> Any:
    return keras.tree.map_structure(at_least_float32, tensors)


@contextlib.contextmanager
def float32_activity_regularizers(model: Any) -> Iterator[None]:
    """Let the activity regularizers of all layers see float32: in float16 their sums overflow."""
    # Only for the time of a call, so that what layers say of themselves and save stays the same.
    changed = []
    for layer in flatten_layers(model):
        regularizer = layer.activity_regularizer
        if regularizer is not None and not isinstance(regularizer, _OfFloat32):
            changed.append((layer, regularizer))
            layer.activity_regularizer = _OfFloat32(regularizer)
    try:
        yield
    finally:
        for layer, regularizer in changed:
            layer.activity_regularizer = regularizer


class _OfFloat32:
    """A regularizer that casts first."""

    def __init__(self, regularizer: Callable[[Any], Any]) -> None:
        self._regularizer = regularizer

    def __call__(self, output: Any) -> Any:
        return self._regularizer(at_least_float32(output))
