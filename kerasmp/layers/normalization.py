"""BatchNormalization that outlives a bad batch."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.layers.twin import twin


@twin(
    inputs="`(batch, ..., channels)`",
    source="[Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167)",
)
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` whose moving statistics a non-finite batch cannot poison.

    When an activation overflows, loss scaling skips the step, but stock BatchNormalization has
    already averaged the inf or NaN into its moving statistics, where they stay for good: training
    looks fine and `evaluate` returns NaN. Here a batch whose statistics are not finite leaves the
    moving statistics of all channels as they were. The arithmetic is float32, as in stock Keras;
    variables are float32 under every mixed policy.

    In a `kerasmp.Model` every trace of a skipped step is undone, also finite ones; this layer is
    for stock models and hand-written loops.

    Example:

    >>> layer = BatchNormalization()
    >>> _ = layer(keras.ops.array([[float("inf"), 1.0], [0.0, 2.0]]), training=True)
    >>> keras.ops.convert_to_numpy(layer.moving_mean).tolist()
    [0.0, 0.0]
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize `inputs`; see the class."""
        if not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        statistics = self.non_trainable_variables
        # A copy: on torch assigning changes the tensor in place.
        before = [ops.copy(variable) for variable in statistics]
        outputs = super().call(inputs, training=training, mask=mask)
        after = [ops.convert_to_tensor(variable) for variable in statistics]
        finite = ops.all(ops.stack([ops.all(ops.isfinite(value)) for value in after]))
        for variable, old, new in zip(statistics, before, after, strict=True):
            variable.assign(ops.where(finite, new, old))
        return outputs
