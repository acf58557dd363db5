"""Activations, pooling and other layers without a kernel that compute in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasmp.layers.base import Float32Call, Float32Weights, drop_in
from kerasmp.ops import in_float32, normalize, softmax
from kerasmp.ops.precision import registered, upcast

# ------------------------------------------------------------------------------------ activations


@drop_in(
    activation="The name or the function, as in Keras: any of `keras.activations`, or your own.",
)
class Activation(Float32Call, keras.layers.Activation):
    """`keras.layers.Activation`, computed in float32 between tensors of the compute dtype.

    In float16 the gradients of gelu, silu, mish and others overflow to NaN, the gradients of
    sigmoid and tanh are computed from rounded outputs, and intermediate squares overflow. As the
    activation of another layer, pass the function: `Dense(8, activation=kerasmp.ops.gelu)`.

    Example:

    >>> layer = Activation("squareplus", dtype="mixed_float16")
    >>> float(layer(keras.ops.array([1000.0]))[0])  # 1000² is inf in float16
    1000.0
    """


@drop_in(
    alpha="The slope at 0 from below. Defaults to 1.",
    source="[Clevert et al., 2015](https://arxiv.org/abs/1511.07289)",
)
class ELU(Float32Call, keras.layers.ELU):
    """`keras.layers.ELU`, computed in float32 between tensors of the compute dtype.

    On TensorFlow `exp(x) - 1` is inaccurate for small `x` in float16.

    Example:

    >>> layer = ELU(dtype="mixed_float16")
    >>> float(layer(keras.ops.array([-100.0]))[0])
    -1.0
    """


@drop_in(inputs="`(batch, ...)`", source="[He et al., 2015](https://arxiv.org/abs/1502.01852)")
class PReLU(Float32Weights, Float32Call, keras.layers.PReLU):
    """`keras.layers.PReLU`, computed in float32 between tensors of the compute dtype.

    The gradient of `alpha` is a sum over the batch and the shared axes, which float16 cannot hold.

    Example:

    >>> layer = PReLU(alpha_initializer="ones", dtype="mixed_float16")
    >>> y = layer(keras.ops.array([[-3.0]]))
    >>> layer.alpha.dtype, keras.backend.standardize_dtype(y.dtype)
    ('float32', 'float16')
    """


@registered
class Softmax(keras.layers.Softmax):
    """`keras.layers.Softmax`, computed in float32 between tensors of the compute dtype.

    Masked logits are set to -1e9 instead of -3e4, below which float16 logits can lie. Fully masked
    rows give zeros. For the last layer of a model, use `DenseHead` or `dtype="float32"`: small
    probabilities are coarse in float16, however they are computed.

    Args:
        axis: The axis or axes over which the probabilities sum to 1. Defaults to the last axis.
        **kwargs: Other arguments of `keras.layers.Softmax`.

    Call arguments:
        inputs: Logits of any shape and float dtype.
        mask: Booleans that broadcast to `inputs`, `False` where a logit is masked. Defaults to
            `None`.

    Output shape:
        Same as the input, in the policy's compute dtype.

    References:
        [Blanchard et al., 2021](https://arxiv.org/abs/1909.03469)

    Example:

    >>> layer = Softmax(dtype="mixed_float16")
    >>> probabilities = layer(keras.ops.array([[-40000.0, 0.0]]), mask=keras.ops.array([[1, 0]]))
    >>> keras.ops.convert_to_numpy(probabilities).tolist()
    [[1.0, 0.0]]
    """

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Compute the probabilities."""
        if isinstance(self.axis, int):
            return in_float32(super().call)(inputs, mask=mask)
        # Keras computes exp(x - logsumexp(x)), which is inaccurate for large logits in float32 too.
        return softmax(inputs, tuple(self.axis), mask)


# ---------------------------------------------------------------------------------------- pooling


def _pooling(axes: str, given: str, size: int) -> dict[str, Any]:
    """Return the table for pooling over some axes.

    Args:
        axes: The names of the spatial axes.
        given: The input shape in the example.
        size: The size of the window in the example.
    """
    return {
        "pool_size": "The size of the window, an integer or one for each axis.",
        "inputs": f"`(batch, {axes}, channels)`, or as given by `data_format`",
        "outputs": f"`(batch, new_{axes.replace(', ', ', new_')}, channels)`",
        "example": f'>>> layer = {{name}}({size}, dtype="mixed_float16")\n'
        f">>> x = keras.ops.full({given}, 100.0)  # their sum is above 65504\n"
        ">>> float(keras.ops.max(layer(x)))\n"
        "100.0",
    }


@drop_in(**_pooling("steps", "(1, 2048, 1)", 2048))
class AveragePooling1D(Float32Call, keras.layers.AveragePooling1D):
    """`keras.layers.AveragePooling1D`, computed in float32 between tensors of the compute dtype."""


@drop_in(**_pooling("rows, columns", "(1, 30, 30, 1)", 30))
class AveragePooling2D(Float32Call, keras.layers.AveragePooling2D):
    """`keras.layers.AveragePooling2D`, computed in float32 between tensors of the compute dtype."""


@drop_in(**_pooling("depth, rows, columns", "(1, 10, 10, 10, 1)", 10))
class AveragePooling3D(Float32Call, keras.layers.AveragePooling3D):
    """`keras.layers.AveragePooling3D`, computed in float32 between tensors of the compute dtype."""


@registered
class GlobalAveragePooling1D(keras.layers.GlobalAveragePooling1D):
    """`keras.layers.GlobalAveragePooling1D`, computed in float32; fully masked sequences give 0.

    With a mask, stock Keras sums in float16, which overflows, and divides 0 by 0 for a fully masked
    sequence.

    Args:
        **kwargs: Arguments of `keras.layers.GlobalAveragePooling1D`: `data_format`, `keepdims`,
            `dtype`, `name`.

    Call arguments:
        inputs: `(batch, steps, channels)`, or as given by `data_format`, in any float dtype.
        mask: `(batch, steps)`, `False` where a step is masked. Defaults to `None`.

    Output shape:
        `(batch, channels)`, or `(batch, 1, channels)` with `keepdims=True`, in the policy's compute
        dtype.

    Example:

    >>> layer = GlobalAveragePooling1D(dtype="mixed_float16")
    >>> mask = keras.ops.array([[True, True], [False, False]])
    >>> keras.ops.convert_to_numpy(layer(keras.ops.full((2, 2, 1), 40000.0), mask=mask)).tolist()
    [[40000.0], [0.0]]
    """

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Average over the steps that are not masked."""
        average = in_float32(super().call)
        if mask is None:
            return average(inputs)
        mask = ops.cast(mask, "bool")
        all_masked = ops.logical_not(ops.any(mask, axis=1, keepdims=True))
        # A fully masked sequence is averaged over all steps, so that 0/0 occurs neither in the
        # forward pass nor in the backward pass.
        outputs = average(inputs, mask=ops.logical_or(mask, all_masked))
        if self.keepdims:
            all_masked = ops.expand_dims(all_masked, 1)
        return ops.where(all_masked, 0, outputs)


# ---------------------------------------------------------------------------------------- merging


@drop_in(
    inputs="A list of shapes that broadcast",
    outputs="The shape to which the inputs broadcast",
    raises={"ValueError": "If the input is not a list."},
)
class Average(Float32Call, keras.layers.Average):
    """`keras.layers.Average`, computed in float32 between tensors of the compute dtype.

    Example:

    >>> x = keras.ops.array([[40000.0]])
    >>> float(Average(dtype="mixed_float16")([x, x])[0, 0])  # their sum is inf in float16
    40000.0
    """


@drop_in(
    axes="The axis of the vectors, or one axis for each input.",
    normalize="Whether to scale the vectors to unit length first. Defaults to `False`.",
    inputs="A list of two shapes of equal size along `axes`",
    outputs="`(batch, ...)` with the other axes of the first input, followed by those of the "
    "second, or `(batch, 1)` for two matrices",
    raises={"ValueError": "If the sizes along `axes` differ."},
)
class Dot(keras.layers.Dot):
    """`keras.layers.Dot` that with `normalize=True` normalizes and multiplies in float32.

    Vectors longer than 256 do not overflow. For a zero vector the product is 0, and so is its
    gradient. Without `normalize` the layer multiplies in the compute dtype, as stock Keras does.

    Example:

    >>> x = keras.ops.array([[300.0, 400.0], [0.0, 0.0]])
    >>> y = Dot(axes=1, normalize=True, dtype="mixed_float16")([x, x])
    >>> keras.ops.convert_to_numpy(y).round(2).tolist()
    [[1.0], [0.0]]
    """

    def call(self, inputs: Any) -> Any:
        """Compute the products."""
        if not self.normalize:
            return super().call(inputs)
        return in_float32(self._cosine)(inputs)

    def _cosine(self, inputs: Any) -> Any:
        axes = [self.axes] * 2 if isinstance(self.axes, int) else self.axes
        units = [normalize(x, axis=axis) for x, axis in zip(inputs, axes, strict=True)]
        # With a name, Keras does not count this layer in its automatic names.
        return keras.layers.Dot(self.axes, name=self.name).call(units)


# ----------------------------------------------------------------------------- norms and penalties


@drop_in(axis="The axis or axes to normalize. Defaults to the last axis.")
class UnitNormalization(keras.layers.UnitNormalization):
    """`keras.layers.UnitNormalization`, computed in float32 between tensors of the compute dtype.

    In float16 the squares of vectors longer than 256 are inf. A zero vector stays zero, and its
    gradient is zero, where stock Keras gives NaN.

    Example:

    >>> layer = UnitNormalization(dtype="mixed_float16")
    >>> y = layer(keras.ops.array([[300.0, 400.0], [0.0, 0.0]]))
    >>> keras.ops.convert_to_numpy(y).round(2).tolist()
    [[0.60009765625, 0.7998046875], [0.0, 0.0]]
    """

    def call(self, inputs: Any) -> Any:
        """Scale the vectors to unit length."""
        axis = self.axis if isinstance(self.axis, int) else tuple(self.axis)
        return normalize(inputs, axis=axis, epsilon=1e-12)  # Keras's


class _Float32L1L2(keras.regularizers.L1L2):
    sees_float32 = True  # kerasmp.Model need not upcast its input

    def __call__(self, x: Any) -> Any:
        return super().__call__(upcast(x))


@drop_in(
    l1="The factor for the sum of absolute values. Defaults to 0.",
    l2="The factor for the sum of squares. Defaults to 0.",
    inputs="`(batch, ...)`",
)
class ActivityRegularization(keras.layers.ActivityRegularization):
    """`keras.layers.ActivityRegularization` whose penalty is float32.

    Stock Keras sums in float16, which gives inf for a large tensor, and TensorFlow cannot add a
    float16 penalty to a float32 loss. Use this layer after another one instead of that layer's
    `activity_regularizer`: the penalty is the same.

    Example:

    >>> layer = ActivityRegularization(l2=0.5, dtype="mixed_float16")
    >>> _ = layer(keras.ops.full((1, 1), 1000.0))  # 1000² is inf in float16
    >>> float(layer.losses[0])
    500000.0
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0, **kwargs: Any) -> None:
        super().__init__(l1, l2, **kwargs)
        self.activity_regularizer = _Float32L1L2(l1, l2)
