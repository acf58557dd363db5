"""The dtype of a Keras variable that exists, changed in place: Keras has no way to do so.

`tests/backend/test_variable_dtypes.py` tells when one of the private names moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend import current

if TYPE_CHECKING:
    from collections.abc import Callable


# Others, float8 say, are parts of a layer that is quantised.
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def takes_dtype(variable: Any, dtype: str) -> bool:
    """Return whether a layer's variable changes where its variables are to have a float dtype.

    Seeds and counters do not. A float dtype that `add_weight` was given cannot be told from that of
    the policy.
    """
    return variable.dtype in _FLOATS and dtype in _FLOATS and variable.dtype != dtype


def set_variable_dtype(variable: Any, dtype: str) -> Callable[[], None]:
    """Change the dtype of a variable, and round its value to it, in place.

    The variable stays the object that layers, optimizers and trackers know, with its name, path,
    trainability, regularizer, constraint and sharding. Steps that TensorFlow has compiled go on
    with what it was: they must be forgotten.

    Args:
        variable: A `keras.Variable` of a floating dtype that has a value.
        dtype: Another floating dtype.

    Returns:
        What puts back the dtype and the value, not a copy of it. A value that was assigned
        meanwhile, as training does, is kept, and cast.

    Example:

    >>> variable = keras.Variable([1.0, 0.1], dtype="float32")
    >>> undo = set_variable_dtype(variable, "float16")
    >>> variable.dtype, float(variable.numpy()[1])
    ('float16', 0.0999755859375)
    >>> undo()
    >>> variable.dtype
    'float32'
    """
    # Around the public reader, which casts within a layer's call.
    before_dtype, before = variable._dtype, variable._value  # noqa: SLF001 - see above
    value, put_back = current().in_dtype(before, dtype)

    def undo() -> None:
        now = keras.ops.stop_gradient(keras.ops.copy(variable.value))
        put_back()
        # Keras has no setter for the dtype, and `assign` copies, or casts.
        variable._dtype, variable._value = before_dtype, before  # noqa: SLF001
        if not _same(now, keras.ops.cast(variable.value, dtype)):
            variable.assign(keras.ops.cast(now, before_dtype))

    variable._dtype, variable._value = dtype, value  # noqa: SLF001
    return undo


def _same(one: Any, other: Any) -> bool:
    ops = keras.ops
    both_nan = ops.logical_and(ops.isnan(one), ops.isnan(other))
    return bool(ops.all(ops.logical_or(ops.equal(one, other), both_nan)))
