"""Layers that normalize data, activations or kernels, and keep their float32 statistics intact."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.backend.keras_internals import AutocastScope
from kerasmp.layers.base import drop_in
from kerasmp.ops.precision import registered, upcast_dtype


@drop_in(
    inputs="`(batch, ..., channels)`",
    source="[Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167)",
)
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` whose moving statistics ignore non-finite batches.

    When an activation overflows, loss scaling skips the step. But the stock layer has already
    averaged the inf or NaN into its moving statistics, where it stays: training looks fine, and
    `evaluate` returns NaN. This layer updates its moving statistics only if the statistics of the
    batch are finite in all channels. The arithmetic is float32, as in the stock layer, and
    variables are float32 under every mixed policy.

    A `kerasmp.Model` undoes every change of a skipped step, including finite ones. Use this layer
    in stock models and in custom training loops.

    Example:

    >>> layer = BatchNormalization()
    >>> _ = layer(keras.ops.array([[float("inf"), 1.0], [0.0, 2.0]]), training=True)
    >>> keras.ops.convert_to_numpy(layer.moving_mean).tolist()
    [0.0, 0.0]
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:  # noqa: FBT001 - Keras's signature
        """Normalize the inputs."""
        if not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        statistics = self.non_trainable_variables
        # Copies, because on torch an assignment changes the tensor in place.
        before = [ops.copy(variable) for variable in statistics]
        outputs = super().call(inputs, training=training, mask=mask)
        after = [ops.convert_to_tensor(variable) for variable in statistics]
        finite = ops.all(ops.stack([ops.all(ops.isfinite(value)) for value in after]))
        for variable, old, new in zip(statistics, before, after, strict=True):
            variable.assign(ops.where(finite, new, old))
        return outputs


@registered
class Normalization(keras.layers.Normalization):
    """`keras.layers.Normalization`, computed in float32; the output has the policy's compute dtype.

    Stock Keras rounds the inputs, the mean and the variance to float16. With a standard deviation
    above 256 the outputs are then 0, and with a mean above 65504 they are NaN. This layer accepts
    data of any range. A subclassed `keras.Model` under a mixed policy rounds its inputs before any
    layer sees them: construct such a model with `autocast=False`.

    Args:
        **kwargs: Arguments of `keras.layers.Normalization`: `axis`, `mean`, `variance`, `invert`,
            `dtype`, `name`. With `invert=True` the output has the range of the raw data, so add
            `dtype="float32"`.

    Input shape:
        As given by `axis`, in any dtype, including integers.

    Output shape:
        Same as the input, in the policy's compute dtype.

    Example:

    >>> layer = Normalization(mean=100000.0, variance=1e6, axis=None, dtype="mixed_float16")
    >>> y = layer(keras.ops.array([[99000.0, 102000.0]]))
    >>> keras.ops.convert_to_numpy(y).tolist(), keras.backend.standardize_dtype(y.dtype)
    ([[-1.0, 2.0]], 'float16')
    """

    @property
    def compute_dtype(self) -> str:
        """float32, or float64 if the policy computes in float64."""
        return upcast_dtype(self.output_dtype)

    @property
    def output_dtype(self) -> str:
        """The policy's compute dtype."""
        return str(super().compute_dtype)

    def call(self, inputs: Any) -> Any:
        """Normalize the inputs."""
        # Not keras.ops: in a tf.data pipeline this layer runs on TensorFlow, whatever the backend.
        return self.backend.cast(super().call(inputs), self.output_dtype)

    def compute_output_spec(self, inputs: Any) -> Any:
        """Return the symbolic output with its actual dtype."""
        return keras.KerasTensor(inputs.shape, dtype=self.output_dtype)


@registered
class SpectralNormalization(keras.layers.SpectralNormalization):
    """`keras.layers.SpectralNormalization` that normalizes the float32 kernel in float32.

    Under "mixed_float16" stock Keras reads the kernel as float16, normalizes it in float16 and
    assigns the result to the variable: a single training step rounds the float32 kernel to float16,
    and from then on small updates are lost. The wrapped layer still computes in its compute dtype.

    Args:
        layer: A layer with a `kernel` or `embeddings` attribute.
        power_iterations: The number of iterations per call. Defaults to 1.
        **kwargs: Other arguments of `keras.layers.SpectralNormalization`.

    Input shape:
        Same as the wrapped layer.

    Output shape:
        Same as the wrapped layer, in the dtype of the inputs after autocasting: the policy's
        compute dtype, but an integer dtype for integer inputs.

    Raises:
        ValueError: If `power_iterations` is not positive, or if the layer has no kernel.

    References:
        [Miyato et al., 2018](https://arxiv.org/abs/1802.05957)

    Example:

    >>> layer = SpectralNormalization(keras.layers.Dense(2), dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 3)), training=True).shape == (1, 2)
    True
    """

    def call(self, inputs: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's signature
        """Normalize the kernel if `training`, and call the wrapped layer."""
        with AutocastScope(None):  # the wrapped layer opens its own scope
            return super().call(inputs, training=training)
