"""Changes the dtype of an existing Keras variable in place, which Keras has no way to do.

`tests/backend/test_variable_dtypes.py` fails if one of the private names moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend import current

if TYPE_CHECKING:
    from collections.abc import Callable


# Variables of other dtypes, such as float8, belong to quantized layers.
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def takes_dtype(variable: Any, dtype: str) -> bool:
    """Return whether a layer's variable changes if the layer's variable dtype becomes `dtype`.

    Seeds and counters do not. A float dtype that was passed to `add_weight` cannot be told from the
    policy's.
    """
    return variable.dtype in _FLOATS and dtype in _FLOATS and variable.dtype != dtype


def set_variable_dtype(variable: Any, dtype: str) -> Callable[[], None]:
    """Change the dtype of a variable in place, and round its value to it.

    Layers, optimizers and trackers keep the same object, with its name, path, trainability,
    regularizer, constraint and sharding. Functions that TensorFlow has compiled continue to use the
    old value, so they must be discarded.

    Args:
        variable: A `keras.Variable` of a floating dtype that has a value.
        dtype: Another floating dtype.

    Returns:
        A function that restores the dtype and the very value. If another value has been assigned
        since, for instance by training, it casts and keeps that one.

    Example:

    >>> variable = keras.Variable([1.0, 0.1], dtype="float32")
    >>> undo = set_variable_dtype(variable, "float16")
    >>> variable.dtype, float(variable.numpy()[1])
    ('float16', 0.0999755859375)
    >>> undo()
    >>> variable.dtype
    'float32'
    """
    # Not the public `value`, which casts inside a layer's call.
    before_dtype, before = variable._dtype, variable._value  # noqa: SLF001 - see above and below
    value, undo_cast = current().cast_variable(before, dtype)

    def undo() -> None:
        now = keras.ops.stop_gradient(keras.ops.copy(variable.value))
        undo_cast()
        # Keras has no setter for the dtype, and `assign` copies or casts.
        variable._dtype, variable._value = before_dtype, before  # noqa: SLF001
        if not _same(now, keras.ops.cast(variable.value, dtype)):
            variable.assign(keras.ops.cast(now, before_dtype))

    variable._dtype, variable._value = dtype, value  # noqa: SLF001
    return undo


def _same(one: Any, other: Any) -> bool:
    ops = keras.ops
    both_nan = ops.logical_and(ops.isnan(one), ops.isnan(other))
    return bool(ops.all(ops.logical_or(ops.equal(one, other), both_nan)))
