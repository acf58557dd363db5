"""Explains the cryptic errors that frameworks raise when float16 meets float32."""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING

import keras

from kerasmp import backend

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBRARIES = {"keras", "kerasmp", "tensorflow", "jax", "torch"}
_FIX = (
    "In call(), Keras casts a layer's inputs and its add_weight() variables to the layer's compute "
    "dtype. It does not cast constants, attributes and tensors that call() creates. Cast these "
    "with keras.ops.cast(value, self.compute_dtype), or use functions of keras.ops, which promote "
    'to the wider dtype, or give the layer dtype="float32".'
)


@contextlib.contextmanager
def dtype_hints() -> Iterator[None]:
    """Add a note to an error about mixed dtypes: the layer, the line, the dtypes and the fix.

    The error itself stays the same, so that code that catches it still does.
    """
    try:
        yield
    except Exception as error:
        if backend.current().is_mixed_dtype_error(error) and not getattr(error, "__notes__", ()):
            error.add_note(f"kerasmp: operands of different float dtypes meet {_place(error)}.")
            error.add_note(_FIX)
        raise


def _place(error: Exception) -> str:
    layer, line = None, ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        # Without a layer, the place is the user's function, such as a loss.
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            line = f"{frame.f_code.co_filename}, line {number}"
            if isinstance(owner, keras.layers.Layer):
                layer = owner
    place = f"at {line}" if line else "in a function of the framework"
    if layer is None:
        return place
    return (
        f"in {type(layer).__name__} {layer.name!r}, which computes in {layer.compute_dtype} and "
        f"keeps its variables in {layer.variable_dtype}, {place}"
    )
