"""Masking that finds any mask value in half precision too."""

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
    """Return where the inputs differ from a mask value, compared in the dtype of the inputs.

    Args:
        inputs: A tensor.
        value: The mask value.

    Example:

    >>> x = keras.ops.array([0.1, 0.2], "float16")
    >>> keras.ops.convert_to_numpy(differs(x, 0.1)).tolist()
    [False, True]
    """
    if _is_float(inputs):
        # Through float32, like the data: rounding twice may give another number than rounding once.
        value = ops.cast(ops.convert_to_tensor(value, upcast_dtype(inputs.dtype)), inputs.dtype)
    return ops.not_equal(inputs, value)


@registered
def as_it_comes(inputs: Any) -> Any:
    """Return the inputs unchanged. In the graph of a model, this replaces an unwanted cast.

    Example:

    >>> as_it_comes(0.1)
    0.1
    """
    return inputs


@registered
class Masking(keras.layers.Masking):
    """`keras.layers.Masking` that compares its inputs with the mask value before rounding them.

    Stock Keras rounds the inputs first. On TensorFlow it then compares them with the unrounded
    value: 0.1, which float16 cannot represent, masks no step, and -99999 is passed on as -inf. This
    layer casts the value to the dtype of the inputs, compares, and rounds only the outputs. It also
    finds the value if a subclassed `keras.Model` under a mixed policy has rounded the inputs.

    Args:
        mask_value: A step is masked if all its features equal this number. Defaults to 0.
        **kwargs: Arguments of `keras.layers.Layer`: `dtype`, `name`.

    Input shape:
        `(batch, steps, features)`, in any dtype.

    Output shape:
        Same as the input, with zeros in masked steps. Floats have the policy's compute dtype.

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
        self.autocast = False  # or Keras would round the inputs before `call`

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:  # noqa: ARG002 - Keras's signature
        """Return a boolean tensor `(batch, steps)`, False where a step is masked."""
        return ops.any(self._differs(as_tensors(inputs)), axis=-1)

    def call(self, inputs: Any) -> Any:
        """Set masked steps to zero."""
        kept = ops.any(self._differs(inputs), axis=-1, keepdims=True)
        outputs = ops.where(kept, inputs, 0)
        if _is_float(outputs):
            outputs = ops.cast(outputs, self.compute_dtype)
        set_keras_mask(outputs, ops.squeeze(kept, axis=-1))
        return outputs

    def _differs(self, inputs: Any) -> Any:
        dtype = upcast_dtype(self.compute_dtype)
        given = keras.backend.standardize_dtype(inputs.dtype)
        if _is_float(inputs) and not is_low_precision(given) and given != dtype:
            inputs = ops.cast(inputs, dtype)
        return differs(inputs, self.mask_value)


def _is_float(tensor: Any) -> bool:
    return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)))
