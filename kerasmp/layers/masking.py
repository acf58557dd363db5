"""Masking with any mask value, in half precision too."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.backend.keras_internals import set_keras_mask
from kerasmp.ops.precision import (
    as_one_node,
    as_tensors,
    is_low_precision,
    registered,
    upcast_dtype,
)


@registered
@as_one_node
def differs(inputs: Any, value: Any) -> Any:
    """Return where inputs are not a mask value, compared in the dtype in which they come.

    Args:
        inputs: A tensor.
        value: The mask value.

    Example:

    >>> x = keras.ops.array([0.1, 0.2], "float16")
    >>> keras.ops.convert_to_numpy(differs(x, 0.1)).tolist()
    [False, True]
    """
    if _is_float(inputs):
        # By way of float32, as the data comes: rounded at once, a number may become another one.
        value = ops.cast(ops.convert_to_tensor(value, upcast_dtype(inputs.dtype)), inputs.dtype)
    return ops.not_equal(inputs, value)


@registered
def as_it_comes(inputs: Any) -> Any:
    """Return the inputs: in a graph, takes the place of a cast that must not be.

    Example:

    >>> as_it_comes(0.1)
    0.1
    """
    return inputs


@registered
class Masking(keras.layers.Masking):
    """`keras.layers.Masking` that looks for the mask value before it rounds its inputs.

    Keras rounds them first. On TensorFlow it then compares them with a value that is not rounded:
    0.1, which float16 does not hold, masks no step, and -99999 stays as -inf. Here inputs are
    compared in the dtype in which they come, with the value in that dtype, and the outputs alone
    are rounded. A subclassed `keras.Model` under a mixed policy rounds its inputs itself; the value
    is found there too.

    Args:
        mask_value: A step is masked if all its features are this number; default 0.
        **kwargs: As for `keras.layers.Masking`: `dtype`, `name`.

    Input shape:
        `(batch, steps, features)`, any dtype.

    Output shape:
        As the input, with zeros in masked steps; floats in the policy's compute dtype.

    Example:

    >>> layer = Masking(-99999.0, dtype="mixed_float16")
    >>> x = keras.ops.array([[[1.0, 2.0], [-99999.0, -99999.0]]])
    >>> keras.ops.convert_to_numpy(layer.compute_mask(x)).tolist()
    [[True, False]]
    >>> keras.ops.convert_to_numpy(layer(x)).tolist()
    [[[1.0, 2.0], [0.0, 0.0]]]
    """

    def __init__(self, mask_value: Any = 0.0, **kwargs: Any) -> None:
        super().__init__(mask_value, **kwargs)
        self.autocast = False  # which rounds inputs before `call` sees them

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:  # noqa: ARG002 - Keras's signature
        """Return which steps are not masked."""
        return ops.any(self._differs(as_tensors(inputs)), axis=-1)

    def call(self, inputs: Any) -> Any:
        """Return the inputs, with zeros in masked steps."""
        kept = ops.any(self._differs(inputs), axis=-1, keepdims=True)
        outputs = ops.where(kept, inputs, 0)
        if _is_float(outputs):
            outputs = ops.cast(outputs, self.compute_dtype)
        set_keras_mask(outputs, ops.squeeze(kept, axis=-1))
        return outputs

    def _differs(self, inputs: Any) -> Any:
        wide = upcast_dtype(self.compute_dtype)
        name = keras.backend.standardize_dtype(inputs.dtype)
        if _is_float(inputs) and not is_low_precision(name) and name != wide:
            inputs = ops.cast(inputs, wide)
        return differs(inputs, self.mask_value)


def _is_float(tensor: Any) -> bool:
    return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)))
