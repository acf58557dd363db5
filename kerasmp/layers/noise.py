"""Layers that draw random numbers, in float32 whatever they compute in."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from kerasmp.layers.twin import twin
from kerasmp.ops import in_float32
from kerasmp.ops.precision import upcast_dtype


class _DropsInFloat32(keras.layers.Layer):
    """What makes each of Keras's layers right that drop: numbers are drawn in their inputs' dtype.

    Inputs, outputs and gradients keep the compute dtype.
    """

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the inputs, some of them dropped while training."""
        if not training or self.rate == 0:
            return inputs
        return in_float32(super().call)(inputs, training=training)


class _SpatialDropout(_DropsInFloat32):
    """The same for what drops whole feature maps, whose config in Keras forgets a mixed policy."""

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, the policy among them."""
        return {**super().get_config(), "dtype": keras.dtype_policies.serialize(self.dtype_policy)}


@twin(
    rate="Fraction of the inputs to drop.",
    source="[Srivastava et al., 2014](https://jmlr.org/papers/v15/srivastava14a.html)",
)
class Dropout(_DropsInFloat32, keras.layers.Dropout):
    """`keras.layers.Dropout` that drops as many inputs as its rate says.

    Keras on TensorFlow draws numbers in the compute dtype, in which there are few: of rates 0.001
    and 0.999 bfloat16 makes 0.0078 and 1. Here they are float32, and so is the factor for what is
    not dropped.

    Example:

    >>> layer = Dropout(0.001, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.ones((1000, 100)), training=True)
    >>> bool(keras.ops.sum(keras.ops.cast(y == 0, "int32")) < 200)
    True
    """


def _spatial(axes: str, given: str) -> dict[str, str]:
    """Return what the docstring says of dropping maps over such axes, and an example of a shape."""
    return {
        "prose": "See `kerasmp.layers.Dropout`.",
        "rate": "Fraction of the feature maps to drop.",
        "inputs": f"`(batch, {axes}, features)`"
        + (", or as `data_format` says" if "," in axes else ""),
        "source": "[Tompson et al., 2014](https://arxiv.org/abs/1411.4280)",
        "example": '>>> layer = {name}(0.5, seed=1, dtype="mixed_float16")\n'
        f">>> y = layer(keras.ops.ones({given}), training=True)\n"
        ">>> bool(keras.ops.all(y == y[:, :1]))\n"
        "True",
    }


@twin(**_spatial("steps", "(1, 2, 8)"))
class SpatialDropout1D(_SpatialDropout, keras.layers.SpatialDropout1D):
    """`keras.layers.SpatialDropout1D` that drops as many feature maps as its rate says."""


@twin(**_spatial("rows, columns", "(1, 2, 2, 8)"))
class SpatialDropout2D(_SpatialDropout, keras.layers.SpatialDropout2D):
    """`keras.layers.SpatialDropout2D` that drops as many feature maps as its rate says."""


@twin(**_spatial("depth, rows, columns", "(1, 2, 2, 2, 8)"))
class SpatialDropout3D(_SpatialDropout, keras.layers.SpatialDropout3D):
    """`keras.layers.SpatialDropout3D` that drops as many feature maps as its rate says."""


class _Gaussian(keras.layers.Layer):
    def _normal(self, inputs: Any, mean: float, stddev: float) -> Any:
        """Return normal numbers for inputs, in float32; Keras draws them in the compute dtype."""
        return keras.random.normal(
            ops.shape(inputs),
            mean=mean,
            stddev=stddev,
            dtype=upcast_dtype(self.compute_dtype),
            seed=self.seed_generator,
        )


@twin(
    stddev="Standard deviation of the noise.",
    source="[Bishop, 1995](https://doi.org/10.1162/neco.1995.7.1.108)",
)
class GaussianNoise(_Gaussian, keras.layers.GaussianNoise):
    """`keras.layers.GaussianNoise` whose noise is drawn and added in float32.

    On JAX the noise of stock Keras has 128 values in bfloat16, and its mean is not 0.

    Example:

    >>> layer = GaussianNoise(1.0, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.zeros((1000, 100)), training=True)
    >>> len(set(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")).ravel())) > 1000
    True
    """

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the inputs, with noise while training."""
        if not training or self.stddev == 0:
            return inputs
        noise = self._normal(inputs, 0.0, self.stddev)
        return ops.cast(ops.cast(inputs, noise.dtype) + noise, self.compute_dtype)


@twin(
    rate="As of a Dropout; the noise has the standard deviation `sqrt(rate / (1 - rate))`.",
    source="[Srivastava et al., 2014](https://jmlr.org/papers/v15/srivastava14a.html), section 10",
)
class GaussianDropout(_Gaussian, keras.layers.GaussianDropout):
    """`keras.layers.GaussianDropout` whose noise is drawn and multiplied by in float32.

    On JAX the noise of stock Keras has 128 values in bfloat16, and its mean is not 1.

    Example:

    >>> layer = GaussianDropout(0.5, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.ones((1000, 100)), training=True)
    >>> len(set(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")).ravel())) > 1000
    True
    """

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the inputs, each times a random number around 1 while training."""
        if not training or self.rate == 0:
            return inputs
        noise = self._normal(inputs, 1.0, math.sqrt(self.rate / (1.0 - self.rate)))
        return ops.cast(ops.cast(inputs, noise.dtype) * noise, self.compute_dtype)
