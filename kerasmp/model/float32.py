"""Gives losses and metrics float32: predictions, and the extra losses of layers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_internals import copy_mask, flatten_layers
from kerasmp.model.hints import dtype_hints

if TYPE_CHECKING:
    from collections.abc import Callable

# Keras passes x, y, y_pred in this order to compute_loss and to compute_metrics.
_Y_PRED = 2


def at_least_float32(tensor: Any) -> Any:
    """Return a float16 or bfloat16 tensor in float32, and any other value unchanged."""
    dtype = getattr(tensor, "dtype", None)
    if dtype is None or keras.backend.standardize_dtype(dtype) not in {"float16", "bfloat16"}:
        return tensor
    return cast(tensor, "float32")


def cast(tensor: Any, dtype: str) -> Any:
    """Return a float tensor in another dtype, with its mask, and any other tensor unchanged."""
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
        return tensor
    return copy_mask(tensor, keras.ops.cast(tensor, dtype))


def float32_predictions(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `compute_loss` or `compute_metrics` with its `y_pred` cast to at least float32.

    Args:
        method: The method, of a kerasmp model, a mixin or a user's subclass.
    """

    @functools.wraps(method)
    def with_float32(model: Any, *args: Any, **kwargs: Any) -> Any:
        if "y_pred" in kwargs:
            kwargs["y_pred"] = keras.tree.map_structure(at_least_float32, kwargs["y_pred"])
        elif len(args) > _Y_PRED:
            y_pred = keras.tree.map_structure(at_least_float32, args[_Y_PRED])
            args = (*args[:_Y_PRED], y_pred, *args[_Y_PRED + 1 :])
        with dtype_hints():
            return method(model, *args, **kwargs)

    return with_float32


def widen_activity_regularizers(model: Any) -> None:
    """Let the activity regularizers of all layers see float32, since their sums overflow float16.

    The change is permanent, and a regularizer is changed once: if each call changed it and put it
    back, another thread might see either.
    """
    for layer in layers_to_widen(model):
        # Bypasses Keras's __setattr__, which tracks values and locks built layers.
        object.__setattr__(layer, "activity_regularizer", _InFloat32(layer.activity_regularizer))


def layers_to_widen(model: Any) -> list[Any]:
    """Return the layers whose activity regularizers `widen_activity_regularizers` would change."""
    return [
        layer
        for layer in flatten_layers(model)
        if layer.activity_regularizer is not None
        and not getattr(layer.activity_regularizer, "sees_float32", False)
    ]


class _InFloat32:
    """A regularizer that casts its input to float32, and otherwise behaves as the one it wraps.

    Layers report and save the wrapped one, and setting a factor sets the wrapped one's.
    """

    __slots__ = ("_regularizer",)
    sees_float32 = True
    _regularizer: Callable[[Any], Any]

    def __init__(self, regularizer: Callable[[Any], Any]) -> None:
        object.__setattr__(self, "_regularizer", regularizer)

    def __call__(self, output: Any) -> Any:
        return self._regularizer(at_least_float32(output))

    @property  # type: ignore[misc]  # read-only, unlike `object.__class__`
    def __class__(self) -> Any:  # isinstance and Keras's serialization use it
        return type(self._regularizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._regularizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._regularizer, name, value)

    def __eq__(self, other: object) -> bool:
        return bool(self._regularizer == other)

    def __hash__(self) -> int:  # Keras looks a registered function up by it
        return hash(self._regularizer)

    def __reduce__(self) -> Any:
        return _InFloat32, (self._regularizer,)
