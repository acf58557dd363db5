"""Activation layers whose values and gradients are right in float16."""

from __future__ import annotations

from typing import Any

import keras

from kerasmp.layers.in_float32 import CallInFloat32, NeverCastWeights
from kerasmp.layers.twin import twin
from kerasmp.ops import in_float32, softmax
from kerasmp.ops.precision import registered


@twin(
    activation="Name or function, as for Keras. Any of `keras.activations` is mended, and any "
    "function of your own.",
)
class Activation(CallInFloat32, keras.layers.Activation):
    """`keras.layers.Activation`, computed in float32 between tensors of the compute dtype.

    In float16 the gradients of gelu, silu, mish and others overflow to NaN, those of sigmoid and
    tanh come from rounded outputs, and squares inside are inf. Inside another layer, pass the
    function: `Dense(8, activation=kerasmp.ops.gelu)`.

    Example:

    >>> layer = Activation("squareplus", dtype="mixed_float16")
    >>> float(layer(keras.ops.array([1000.0]))[0])  # 1000² is inf in float16
    1000.0
    """


@twin(
    alpha="Slope at 0 from below; default 1.",
    source="[Clevert et al., 2015](https://arxiv.org/abs/1511.07289)",
)
class ELU(CallInFloat32, keras.layers.ELU):
    """`keras.layers.ELU`, computed in float32 between tensors of the compute dtype.

    On TensorFlow `exp(x) - 1` of a small `x` is coarse in float16.

    Example:

    >>> layer = ELU(dtype="mixed_float16")
    >>> float(layer(keras.ops.array([-100.0]))[0])
    -1.0
    """


@twin(inputs="`(batch, ...)`", source="[He et al., 2015](https://arxiv.org/abs/1502.01852)")
class PReLU(NeverCastWeights, CallInFloat32, keras.layers.PReLU):
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

    Masked logits are set to -1e9 and not to -3e4, which other float16 logits can lie below. Rows
    that are masked in full give zeros. For a model's last layer take `DenseHead` or
    `dtype="float32"`: small probabilities are coarse in float16, whoever computes them.

    Args:
        axis: Axis or axes over which the probabilities sum to 1; default the last.
        **kwargs: As for `keras.layers.Softmax`.

    Call arguments:
        inputs: Logits of any shape and float dtype.
        mask: Booleans that broadcast to `inputs`, True where a logit counts; default None.

    Output shape:
        As the input, in the policy's compute dtype.

    References:
        [Blanchard et al., 2021](https://arxiv.org/abs/1909.03469)

    Example:

    >>> layer = Softmax(dtype="mixed_float16")
    >>> probabilities = layer(keras.ops.array([[-40000.0, 0.0]]), mask=keras.ops.array([[1, 0]]))
    >>> keras.ops.convert_to_numpy(probabilities).tolist()
    [[1.0, 0.0]]
    """

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Return the probabilities."""
        if isinstance(self.axis, int):
            return in_float32(super().call)(inputs, mask=mask)
        # Keras takes exp(x - logsumexp(x)), which is coarse for large logits in float32 too.
        return softmax(inputs, tuple(self.axis), mask)
