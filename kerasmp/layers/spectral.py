"""SpectralNormalization that leaves the float32 kernel float32."""

from __future__ import annotations

from typing import Any

import keras

from kerasmp.backend.keras_internals import AutocastScope
from kerasmp.ops.precision import registered


@registered
class SpectralNormalization(keras.layers.SpectralNormalization):
    """`keras.layers.SpectralNormalization` that normalizes the float32 kernel in float32.

    Stock Keras under "mixed_float16" reads the kernel as float16, normalizes it in float16 and
    assigns the result back: one training step rounds the float32 kernel to float16, and small
    updates are lost from then on. The layer inside computes in its own compute dtype as before.

    Args:
        layer: A layer with a `kernel` or an `embeddings` attribute.
        power_iterations: Number of iterations in each call, default 1.
        **kwargs: As for `keras.layers.SpectralNormalization`.

    Input shape:
        That of the layer.

    Output shape:
        That of the layer, in the dtype of the inputs after they were cast.

    Raises:
        ValueError: If `power_iterations` is not positive, or the layer has no kernel.

    References:
        [Miyato et al., 2018](https://arxiv.org/abs/1802.05957)

    Example:

    >>> layer = SpectralNormalization(keras.layers.Dense(2), dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 3)), training=True).shape == (1, 2)
    True
    """

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Normalize the kernel if `training`, and call the layer."""
        with AutocastScope(None):  # The layer inside opens its own.
            return super().call(inputs, training=training)
