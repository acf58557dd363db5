"""Layers that draw random numbers, in float32 whatever they compute in."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from kerasmp.ops import in_float32
from kerasmp.ops.precision import wide_dtype


class _DropsInFloat32(keras.layers.Layer):
    """What makes each of Keras's layers right that drop: numbers are drawn in their inputs' dtype.

    Inputs, outputs and gradients keep the compute dtype.
    """

    def call(self, inputs: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's
        """Return the inputs, some of them dropped while training."""
        if not training or self.rate == 0:
            return inputs
        return in_float32(super().call)(inputs, training=training)


class _SpatialDropout(_DropsInFloat32):
    """The same for what drops whole feature maps, whose config in Keras forgets a mixed policy."""

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, the policy among them."""
        return {**super().get_config(), "dtype": keras.dtype_policies.serialize(self.dtype_policy)}


@keras.saving.register_keras_serializable(package="kerasmp")
class Dropout(_DropsInFloat32, keras.layers.Dropout):
    """`keras.layers.Dropout` that drops as many inputs as its rate says.

    Keras on TensorFlow draws numbers in the compute dtype, in which there are few: of rates 0.001
    and 0.999 bfloat16 makes 0.0078 and 1. Here they are float32, and so is the factor for what is
    not dropped.

    Args:
        rate: Fraction of the inputs to drop.
        **kwargs: As for `keras.layers.Dropout`: `noise_shape`, `seed`, `dtype`, `name`.

    Input shape:
        Any, of any float dtype.

    Output shape:
        As the input, in the policy's compute dtype.

    References:
        Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014,
        https://jmlr.org/papers/v15/srivastava14a.html.

    Example:

    >>> layer = Dropout(0.001, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.ones((1000, 100)), training=True)
    >>> bool(keras.ops.sum(keras.ops.cast(y == 0, "int32")) < 200)
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class SpatialDropout1D(_SpatialDropout, keras.layers.SpatialDropout1D):
    """`keras.layers.SpatialDropout1D` that drops as many feature maps as its rate says.

    See `kerasmp.layers.Dropout`.

    Args:
        rate: Fraction of the feature maps to drop.
        **kwargs: As for `keras.layers.SpatialDropout1D`: `seed`, `dtype`, `name`.

    Input shape:
        `(batch, steps, features)`, any float dtype.

    Output shape:
        As the input, in the policy's compute dtype.

    References:
        Tompson et al., Efficient Object Localization Using Convolutional Networks, 2014,
        https://arxiv.org/abs/1411.4280.

    Example:

    >>> layer = SpatialDropout1D(0.5, seed=1, dtype="mixed_float16")
    >>> y = layer(keras.ops.ones((1, 2, 8)), training=True)
    >>> bool(keras.ops.all(y[:, 0] == y[:, 1]))
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class SpatialDropout2D(_SpatialDropout, keras.layers.SpatialDropout2D):
    """`keras.layers.SpatialDropout2D` that drops as many feature maps as its rate says.

    See `kerasmp.layers.Dropout`.

    Args:
        rate: Fraction of the feature maps to drop.
        **kwargs: As for `keras.layers.SpatialDropout2D`: `data_format`, `seed`, `dtype`, `name`.

    Input shape:
        `(batch, rows, columns, features)`, or as `data_format` says, any float dtype.

    Output shape:
        As the input, in the policy's compute dtype.

    References:
        Tompson et al., Efficient Object Localization Using Convolutional Networks, 2014,
        https://arxiv.org/abs/1411.4280.

    Example:

    >>> layer = SpatialDropout2D(0.5, seed=1, dtype="mixed_float16")
    >>> y = layer(keras.ops.ones((1, 2, 2, 8)), training=True)
    >>> bool(keras.ops.all(y[:, 0] == y[:, 1]))
    True
    """


@keras.saving.register_keras_serializable(package="kerasmp")
class SpatialDropout3D(_SpatialDropout, keras.layers.SpatialDropout3D):
    """`keras.layers.SpatialDropout3D` that drops as many feature maps as its rate says.

    See `kerasmp.layers.Dropout`.

    Args:
        rate: Fraction of the feature maps to drop.
        **kwargs: As for `keras.layers.SpatialDropout3D`: `data_format`, `seed`, `dtype`, `name`.

    Input shape:
        `(batch, depth, rows, columns, features)`, or as `data_format` says, any float dtype.

    Output shape:
        As the input, in the policy's compute dtype.

    References:
        Tompson et al., Efficient Object Localization Using Convolutional Networks, 2014,
        https://arxiv.org/abs/1411.4280.

    Example:

    >>> layer = SpatialDropout3D(0.5, seed=1, dtype="mixed_float16")
    >>> y = layer(keras.ops.ones((1, 2, 2, 2, 8)), training=True)
    >>> bool(keras.ops.all(y[:, 0] == y[:, 1]))
    True
    """


class _Gaussian(keras.layers.Layer):
    def _normal(self, inputs: Any, mean: float, stddev: float) -> Any:
        """Return normal numbers for inputs, in float32; Keras draws them in the compute dtype."""
        return keras.random.normal(
            ops.shape(inputs),
            mean=mean,
            stddev=stddev,
            dtype=wide_dtype(self.compute_dtype),
            seed=self.seed_generator,
        )


@keras.saving.register_keras_serializable(package="kerasmp")
class GaussianNoise(_Gaussian, keras.layers.GaussianNoise):
    """`keras.layers.GaussianNoise` whose noise is drawn and added in float32.

    On JAX the noise of stock Keras has 128 values in bfloat16, and its mean is not 0.

    Args:
        stddev: Standard deviation of the noise.
        **kwargs: As for `keras.layers.GaussianNoise`: `seed`, `dtype`, `name`.

    Input shape:
        Any, of any float dtype.

    Output shape:
        As the input, in the policy's compute dtype.

    References:
        Bishop, Training with Noise is Equivalent to Tikhonov Regularization, 1995,
        https://doi.org/10.1162/neco.1995.7.1.108.

    Example:

    >>> layer = GaussianNoise(1.0, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.zeros((1000, 100)), training=True)
    >>> len(set(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")).ravel())) > 1000
    True
    """

    def call(self, inputs: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's
        """Return the inputs, with noise while training."""
        if not training or self.stddev == 0:
            return inputs
        noise = self._normal(inputs, 0.0, self.stddev)
        return ops.cast(ops.cast(inputs, noise.dtype) + noise, self.compute_dtype)


@keras.saving.register_keras_serializable(package="kerasmp")
class GaussianDropout(_Gaussian, keras.layers.GaussianDropout):
    """`keras.layers.GaussianDropout` whose noise is drawn and multiplied by in float32.

    On JAX the noise of stock Keras has 128 values in bfloat16, and its mean is not 1.

    Args:
        rate: As of a Dropout; the noise has the standard deviation `sqrt(rate / (1 - rate))`.
        **kwargs: As for `keras.layers.GaussianDropout`: `seed`, `dtype`, `name`.

    Input shape:
        Any, of any float dtype.

    Output shape:
        As the input, in the policy's compute dtype.

    References:
        Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014,
        https://jmlr.org/papers/v15/srivastava14a.html, section 10.

    Example:

    >>> layer = GaussianDropout(0.5, seed=1, dtype="mixed_bfloat16")
    >>> y = layer(keras.ops.ones((1000, 100)), training=True)
    >>> len(set(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")).ravel())) > 1000
    True
    """

    def call(self, inputs: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's
        """Return the inputs, each times a random number around 1 while training."""
        if not training or self.rate == 0:
            return inputs
        noise = self._normal(inputs, 1.0, math.sqrt(self.rate / (1.0 - self.rate)))
        return ops.cast(ops.cast(inputs, noise.dtype) * noise, self.compute_dtype)
