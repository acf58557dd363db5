"""A hint beside the cryptic error of a framework that was given float16 with float32."""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend

if TYPE_CHECKING:
    from collections.abc import Iterator

_REMEDY = (
    "Within call(), Keras casts the inputs of a layer and the weights of add_weight() to the "
    "layer's compute dtype; it does not cast constants, attributes and what call() makes itself. "
    "Cast those, keras.ops.cast(value, self.compute_dtype); or use functions of keras.ops, which "
    'promote to the wider dtype; or give the layer dtype="float32".'
)


@contextlib.contextmanager
def dtype_hints() -> Iterator[None]:
    """Add a note to an error of mixed dtypes: the layer, the place, the dtypes and the remedy.

    The error stays what it is, so that whoever catches it still does.
    """
    try:
        yield
    except Exception as error:
        if backend.current().mixes_dtypes(error) and not getattr(error, "__notes__", ()):
            error.add_note(f"kerasmp: operands of different float dtypes meet {_place(error)}.")
            error.add_note(_REMEDY)
        raise


def _place(error: Exception) -> str:
    layer, place = None, ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        # A function of the user's own, a loss say, is the place where there is no layer.
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            place = f"{frame.f_code.co_filename}, line {line}"
            if isinstance(owner, keras.layers.Layer):
                layer = owner
    where = f"at {place}" if place else "in a function of the framework"
    return f"{_described(layer)}, {where}" if layer is not None else where


def _described(layer: Any) -> str:
    return (
        f"in {type(layer).__name__} {layer.name!r}, which computes in {layer.compute_dtype} and "
        f"keeps its variables in {layer.variable_dtype}"
    )


_LIBRARIES = {"keras", "kerasmp", "tensorflow", "jax", "torch"}
