"""Penalties on activations that are summed in float32."""

from __future__ import annotations

from typing import Any

import keras

from kerasmp.layers.twin import twin
from kerasmp.ops.precision import upcast


class _L1L2(keras.regularizers.L1L2):
    """`keras.regularizers.L1L2` of a float32 copy."""

    sees_float32 = True  # models of ours ask

    def __call__(self, x: Any) -> Any:
        return super().__call__(upcast(x))


@twin(
    l1="Factor of the sum of absolute values; default 0.",
    l2="Factor of the sum of squares; default 0.",
    inputs="`(batch, ...)`",
)
class ActivityRegularization(keras.layers.ActivityRegularization):
    """`keras.layers.ActivityRegularization` whose penalty is float32.

    Keras sums in float16, which gives inf for a large tensor, and TensorFlow refuses to add a
    float16 penalty to a float32 loss. In place of a layer's own `activity_regularizer`, put this
    layer after it: the penalty is the same.

    Example:

    >>> layer = ActivityRegularization(l2=0.5, dtype="mixed_float16")
    >>> _ = layer(keras.ops.full((1, 1), 1000.0))  # 1000² is inf in float16
    >>> float(layer.losses[0])
    500000.0
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0, **kwargs: Any) -> None:
        super().__init__(l1, l2, **kwargs)
        self.activity_regularizer = _L1L2(l1, l2)
