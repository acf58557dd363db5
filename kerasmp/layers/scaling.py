"""Layers that scale their inputs: by statistics of the data, or to length 1."""

from __future__ import annotations

from typing import Any

import keras

from kerasmp.layers.twin import twin
from kerasmp.ops import normalize
from kerasmp.ops.precision import registered, upcast_dtype


@registered
class Normalization(keras.layers.Normalization):
    """`keras.layers.Normalization` in float32, whose output has the policy's compute dtype.

    Keras rounds mean and variance to float16, where a standard deviation above 256 makes
    everything 0 and a mean above 65504 makes it NaN, and rounds the inputs before it sees them.
    Raw data may have any range; after this layer it fits. A subclassed `keras.Model` under a mixed
    policy rounds its inputs itself: construct such a model with `autocast=False`.

    Args:
        **kwargs: As for Keras: `axis`, `mean`, `variance`, `invert`, `dtype`, `name`. With
            `invert=True` the output has the range of raw data: add `dtype="float32"`.

    Input shape:
        As `axis` says; any dtype, also whole numbers.

    Output shape:
        As the input, in the policy's compute dtype.

    Example:

    >>> layer = Normalization(mean=100000.0, variance=1e6, axis=None, dtype="mixed_float16")
    >>> y = layer(keras.ops.array([[99000.0, 102000.0]]))
    >>> keras.ops.convert_to_numpy(y).tolist(), keras.backend.standardize_dtype(y.dtype)
    ([[-1.0, 2.0]], 'float16')
    """

    @property
    def compute_dtype(self) -> str:
        """The policy's compute dtype, or float32 where that is narrower."""
        return upcast_dtype(self.output_dtype)

    @property
    def output_dtype(self) -> str:
        """The policy's compute dtype."""
        return str(super().compute_dtype)

    def call(self, inputs: Any) -> Any:
        """Return the scaled inputs."""
        # Not keras.ops: in a tf.data pipeline this layer runs on TensorFlow, whatever the backend.
        return self.backend.cast(super().call(inputs), self.output_dtype)

    def compute_output_spec(self, inputs: Any) -> Any:
        """Return the symbolic output, with its true dtype."""
        return keras.KerasTensor(inputs.shape, dtype=self.output_dtype)


@twin(axis="Axis or axes along which the length is 1; default the last.")
class UnitNormalization(keras.layers.UnitNormalization):
    """`keras.layers.UnitNormalization`, computed in float32 between tensors of the compute dtype.

    In float16 the squares of vectors longer than 256 are inf. A zero vector stays zero, and so is
    its gradient, where Keras gives NaN.

    Example:

    >>> layer = UnitNormalization(dtype="mixed_float16")
    >>> y = layer(keras.ops.array([[300.0, 400.0], [0.0, 0.0]]))
    >>> keras.ops.convert_to_numpy(y).round(2).tolist()
    [[0.60009765625, 0.7998046875], [0.0, 0.0]]
    """

    def call(self, inputs: Any) -> Any:
        """Return vectors of length 1."""
        axis = self.axis if isinstance(self.axis, int) else tuple(self.axis)
        return normalize(inputs, axis=axis, epsilon=1e-12)  # Keras's
