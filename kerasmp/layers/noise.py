"""Dropout and noise whose random numbers are drawn in float32.

Keras draws them in the compute dtype, in which there are few different numbers.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from kerasmp.layers.base import drop_in
from kerasmp.ops import in_float32
from kerasmp.ops.precision import upcast_dtype

_SRIVASTAVA = "[Srivastava et al., 2014](https://jmlr.org/papers/v15/srivastava14a.html)"


class _Float32Dropout(keras.layers.Layer):
    """A mixin that drops in float32; inputs, outputs and gradients keep the compute dtype."""

    def call(self, inputs: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's signature
        """Drop some of the inputs while training."""
        if not training or self.rate == 0:
            return inputs
        return in_float32(super().call)(inputs, training=training)


@drop_in(rate="The fraction of the inputs to drop.", source=_SRIVASTAVA)
class Dropout(_Float32Dropout, keras.layers.Dropout):
    """`keras.layers.Dropout` that drops exactly the given fraction of its inputs on average.

    On TensorFlow Keras draws random numbers in the compute dtype, which has few of them: in
    bfloat16, a rate of 0.001 becomes 0.0078, and a rate of 0.999 becomes 1. This layer draws them
    in float32, and scales the remaining inputs in float32.

    Example:

    >>> layer = Dropout(0.001, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.ones((1000, 100)), training=True)
    >>> bool(keras.ops.sum(keras.ops.cast(y == 0, "int32")) < 200)
    True
    """


class _SpatialDropout(_Float32Dropout):
    def get_config(self) -> dict[str, Any]:
        """Return the config with the whole policy, of which Keras saves only a dtype."""
        return {**super().get_config(), "dtype": keras.dtype_policies.serialize(self.dtype_policy)}


def _spatial(axes: str, given: str) -> dict[str, Any]:
    """Return the table for dropout over some axes.

    Args:
        axes: The names of the spatial axes.
        given: The input shape in the example.
    """
    return {
        "prose": "See `kerasmp.layers.Dropout`.",
        "rate": "The fraction of the feature maps to drop.",
        "inputs": f"`(batch, {axes}, features)`"
        + (", or as given by `data_format`" if "," in axes else ""),
        "source": "[Tompson et al., 2014](https://arxiv.org/abs/1411.4280)",
        "example": '>>> layer = {name}(0.5, seed=1, dtype="mixed_float16")\n'
        f">>> y = layer(keras.ops.ones({given}), training=True)\n"
        ">>> bool(keras.ops.all(y == y[:, :1]))\n"
        "True",
    }


@drop_in(**_spatial("steps", "(1, 2, 8)"))
class SpatialDropout1D(_SpatialDropout, keras.layers.SpatialDropout1D):
    """`keras.layers.SpatialDropout1D` that drops exactly the given fraction on average."""


@drop_in(**_spatial("rows, columns", "(1, 2, 2, 8)"))
class SpatialDropout2D(_SpatialDropout, keras.layers.SpatialDropout2D):
    """`keras.layers.SpatialDropout2D` that drops exactly the given fraction on average."""


@drop_in(**_spatial("depth, rows, columns", "(1, 2, 2, 2, 8)"))
class SpatialDropout3D(_SpatialDropout, keras.layers.SpatialDropout3D):
    """`keras.layers.SpatialDropout3D` that drops exactly the given fraction on average."""


class _Gaussian(keras.layers.Layer):
    def _normal(self, inputs: Any, mean: float, stddev: float) -> Any:
        """Draw normally distributed float32 numbers of the shape of the inputs."""
        return keras.random.normal(
            ops.shape(inputs),
            mean=mean,
            stddev=stddev,
            dtype=upcast_dtype(self.compute_dtype),
            seed=self.seed_generator,
        )


@drop_in(
    stddev="The standard deviation of the noise.",
    source="[Bishop, 1995](https://doi.org/10.1162/neco.1995.7.1.108)",
)
class GaussianNoise(_Gaussian, keras.layers.GaussianNoise):
    """`keras.layers.GaussianNoise` whose noise is drawn and added in float32.

    On JAX the bfloat16 noise of stock Keras has 128 different values, and its mean is not 0.

    Example:

    >>> layer = GaussianNoise(1.0, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.zeros((1000, 100)), training=True)
    >>> len(set(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")).ravel())) > 1000
    True
    """

    def call(self, inputs: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Add noise while training."""
        if not training or self.stddev == 0:
            return inputs
        noise = self._normal(inputs, 0.0, self.stddev)
        return ops.cast(ops.cast(inputs, noise.dtype) + noise, self.compute_dtype)


@drop_in(
    rate="The rate, as for Dropout. The noise has the standard deviation `sqrt(rate/(1-rate))`.",
    source=f"{_SRIVASTAVA}, section 10",
)
class GaussianDropout(_Gaussian, keras.layers.GaussianDropout):
    """`keras.layers.GaussianDropout` whose noise is drawn and multiplied in float32.

    On JAX the bfloat16 noise of stock Keras has 128 different values, and its mean is not 1.

    Example:

    >>> layer = GaussianDropout(0.5, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.ones((1000, 100)), training=True)
    >>> len(set(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")).ravel())) > 1000
    True
    """

    def call(self, inputs: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Multiply each input by a random number around 1 while training."""
        if not training or self.rate == 0:
            return inputs
        noise = self._normal(inputs, 1.0, math.sqrt(self.rate / (1.0 - self.rate)))
        return ops.cast(ops.cast(inputs, noise.dtype) * noise, self.compute_dtype)
