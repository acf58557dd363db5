"""Initializers that work in half precision, so that a file of a narrow model can be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    import contextlib


@keras.saving.register_keras_serializable(package="kerasmp")
class Orthogonal(keras.initializers.Orthogonal):
    """`keras.initializers.Orthogonal` that computes in float32 and rounds.

    Keras's own, the default of LSTM and GRU, raises in bfloat16, and on JAX and torch in float16:
    no backend has a QR decomposition there. Loading a model calls initializers before it reads the
    values.

    Args:
        gain: As for Keras's.
        seed: As for Keras's.

    Example:

    >>> keras.backend.standardize_dtype(Orthogonal()((4, 4), dtype="bfloat16").dtype)
    'bfloat16'
    """

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """Return the initial values, rounded to `dtype`."""
        dtype = keras.backend.standardize_dtype(dtype)
        return keras.ops.cast(super().__call__(shape, dtype="float32"), dtype)


def make_loadable(layer: Any, dtype: str, undo: contextlib.ExitStack) -> None:
    """Replace the initializers of a layer that raise in half precision by those that do not.

    Args:
        layer: The layer; those inside are left alone.
        dtype: That of its variables. In a wide one Keras's own initializers come back.
        undo: Is given what puts them back.
    """
    theirs, ours = keras.initializers.Orthogonal, Orthogonal
    old, new = (theirs, ours) if dtype in HALVES else (ours, theirs)
    for name, value in list(vars(layer).items()):
        if type(value) is old:
            undo.callback(setattr, layer, name, value)
            setattr(layer, name, new(**value.get_config()))
