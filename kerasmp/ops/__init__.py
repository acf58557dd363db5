"""Numerics that are right in float16: float32 inside, the dtype of their input outside.

For custom layers, losses and training steps. Names and arguments are those of `keras.ops`, of
`keras.activations` and, for losses, of `keras.losses`.
"""

from kerasmp.ops.activations import (
    celu,
    elu,
    exponential,
    gelu,
    glu,
    hard_silu,
    hard_swish,
    log_sigmoid,
    mish,
    selu,
    sigmoid,
    silu,
    softplus,
    softsign,
    sparse_plus,
    sparse_sigmoid,
    squareplus,
    swish,
    tanh,
    tanh_shrink,
)
from kerasmp.ops.attention import (
    dot_product_attention,
)
from kerasmp.ops.losses import (
    binary_crossentropy,
    binary_focal_crossentropy,
    categorical_crossentropy,
    categorical_focal_crossentropy,
    cosine_similarity,
    kl_divergence,
    mean_absolute_percentage_error,
    mean_squared_error,
    poisson,
    sparse_categorical_crossentropy,
    squared_hinge,
)
from kerasmp.ops.precision import (
    in_float32,
)
from kerasmp.ops.reductions import (
    average_pool,
    cumsum,
    logsumexp,
    mean,
    norm,
    normalize,
    std,
    sum,  # noqa: A004 - as in keras.ops
    var,
)
from kerasmp.ops.softmax import (
    log_softmax,
    softmax,
)

__all__ = [
    "average_pool",
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "categorical_crossentropy",
    "categorical_focal_crossentropy",
    "celu",
    "cosine_similarity",
    "cumsum",
    "dot_product_attention",
    "elu",
    "exponential",
    "gelu",
    "glu",
    "hard_silu",
    "hard_swish",
    "in_float32",
    "kl_divergence",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "mean",
    "mean_absolute_percentage_error",
    "mean_squared_error",
    "mish",
    "norm",
    "normalize",
    "poisson",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "softsign",
    "sparse_categorical_crossentropy",
    "sparse_plus",
    "sparse_sigmoid",
    "squared_hinge",
    "squareplus",
    "std",
    "sum",
    "swish",
    "tanh",
    "tanh_shrink",
    "var",
]
