"""What lets Keras quantize layers of ours as it does its own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from collections.abc import Callable


class QuantizesAsStock(keras.layers.Layer):
    """Mixed in before a Keras layer that can be quantized: Keras refuses all subclasses of it."""

    def quantize(self, mode: Any = None, type_check: bool = True, **kwargs: Any) -> None:
        """Quantize the layer in place; see the class in Keras."""
        # A class derived from ours may compute something else, as one derived from Keras's may.
        ours = type(self).__module__.partition(".")[0] == __name__.partition(".")[0]
        super().quantize(mode, type_check=type_check and not ours, **kwargs)


def without_type_check(quantize: Callable[..., None]) -> Callable[..., None]:
    """Return the `quantize` of a layer that was made as a stock one, and turned into one of ours.

    Keras binds it when the layer is made, and the stock one refuses other classes than its own.
    """

    @functools.wraps(quantize)
    def unchecked(*args: Any, **kwargs: Any) -> None:
        quantize(*args, **{**kwargs, "type_check": False})

    return unchecked
