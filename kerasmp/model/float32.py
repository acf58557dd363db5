"""What losses and metrics are given: predictions and extra losses in float32."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_internals import flatten_layers, with_mask_of
from kerasmp.model.hints import dtype_hints

if TYPE_CHECKING:
    from collections.abc import Callable

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


def widen_activity_regularizers(model: Any) -> None:
    """Let the activity regularizers of all layers see float32: in float16 their sums overflow.

    For good, and where a layer has one that was not seen yet: what a call set and took back,
    another thread would find there, or not.

    Args:
        model: The model.
    """
    for layer in regularized_in_half(model):
        # Around Keras's own __setattr__, which tracks what it is given and locks built layers.
        object.__setattr__(layer, "activity_regularizer", _OfFloat32(layer.activity_regularizer))


def regularized_in_half(model: Any) -> list[Any]:
    """Return the layers whose activity regularizers `widen_activity_regularizers` would change."""
    return [
        layer
        for layer in flatten_layers(model)
        if layer.activity_regularizer is not None
        and not getattr(layer.activity_regularizer, "sees_float32", False)
    ]


class _OfFloat32:
    """A regularizer that casts first, and is in all else the one that it stands for.

    What layers say of themselves and save stays the same, and who changes a factor changes it.
    """

    __slots__ = ("_regularizer",)
    sees_float32 = True
    _regularizer: Callable[[Any], Any]

    def __init__(self, regularizer: Callable[[Any], Any]) -> None:
        object.__setattr__(self, "_regularizer", regularizer)

    def __call__(self, output: Any) -> Any:
        return self._regularizer(at_least_float32(output))

    @property  # type: ignore[misc]  # object's can be set, and need not be
    def __class__(self) -> Any:  # isinstance and Keras's serialisation go by it
        return type(self._regularizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._regularizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._regularizer, name, value)

    def __eq__(self, other: object) -> bool:
        return bool(self._regularizer == other)

    def __hash__(self) -> int:  # a function is registered under a name by it
        return hash(self._regularizer)

    def __reduce__(self) -> Any:
        return _OfFloat32, (self._regularizer,)
