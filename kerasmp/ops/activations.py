"""Activations whose values and gradients are right in float16.

Each has the name, the arguments and the defaults of the function in `keras.activations`, computes
in float32, and returns the dtype of its input. In float16 the gradients of the stock activations
overflow (a large gradient times `x` is inf, and inf times 0 is NaN), or are computed from an output
that was rounded to float16. All are registered with Keras: a model with
`Dense(8, activation=kerasmp.ops.gelu)` is saved and loaded like any other.

The rest of `keras.activations`, the relu family and piecewise linear ones, needs no replacement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp.docstrings import T, documented
from kerasmp.ops.precision import in_float32, registered

if TYPE_CHECKING:
    from collections.abc import Callable


def _activation(source: str = "", *, at: float, gives: float, **args: str) -> Callable[[T], T]:
    """Return a decorator that turns a formula into a float32 activation with a full docstring.

    Args:
        source: The paper that introduced it, if known.
        at: A number to use in the example.
        gives: The value of the activation at that number.
        **args: The descriptions of the arguments other than `x`.
    """
    document = documented(
        args={"x": "A tensor of any shape and float dtype.", **args},
        returns="A tensor of the same shape and dtype as `x`.",
        references=source,
        example=f'>>> float({{name}}(keras.ops.array({at}, "float16")))\n{gives}',
    )
    return lambda function: registered(in_float32(document(function)))


@_activation(at=0.0, gives=0.5)
def sigmoid(x: Any) -> Any:
    """Compute `1 / (1 + exp(-x))`."""
    return ops.sigmoid(x)


@_activation(at=-1000.0, gives=-1000.0)
def log_sigmoid(x: Any) -> Any:
    """Compute `log(sigmoid(x))`."""
    return ops.log_sigmoid(x)


@_activation(at=0.0, gives=0.0)
def tanh(x: Any) -> Any:
    """Compute the hyperbolic tangent of `x`."""
    return ops.tanh(x)


@_activation(at=9.0, gives=8.0)
def tanh_shrink(x: Any) -> Any:
    """Compute `x - tanh(x)`."""
    return ops.tanh_shrink(x)


@_activation(
    "[Hendrycks and Gimpel, 2016](https://arxiv.org/abs/1606.08415)",
    at=100.0,
    gives=100.0,
    approximate="Whether to use the tanh approximation. Defaults to `False`.",
)
def gelu(x: Any, approximate: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's signature
    """Compute `x` times the cumulative distribution function of the normal distribution at `x`.

    The default is the exact form, as in `keras.activations` and unlike `keras.ops`.
    """
    return ops.gelu(x, approximate=approximate)


@_activation("[Ramachandran et al., 2017](https://arxiv.org/abs/1710.05941)", at=100.0, gives=100.0)
def silu(x: Any) -> Any:
    """Compute `x * sigmoid(x)`, also known as swish."""
    return ops.silu(x)


@_activation("[Howard et al., 2019](https://arxiv.org/abs/1905.02244)", at=3.0, gives=3.0)
def hard_silu(x: Any) -> Any:
    """Compute `x * hard_sigmoid(x)`, also known as hard swish."""
    return ops.hard_silu(x)


@_activation("[Misra, 2019](https://arxiv.org/abs/1908.08681)", at=100.0, gives=100.0)
def mish(x: Any) -> Any:
    """Compute `x * tanh(softplus(x))`."""
    return x * ops.tanh(ops.softplus(x))


@registered
@in_float32
def glu(x: Any, axis: int = -1) -> Any:
    """Multiply one half of `x` by the sigmoid of the other half.

    Args:
        x: A tensor of any shape and float dtype, with an even length along `axis`.
        axis: The axis to split. Defaults to the last axis.

    Returns:
        A tensor of half that length along `axis`, in the dtype of `x`.

    References:
        [Dauphin et al., 2016](https://arxiv.org/abs/1612.08083)

    Example:

    >>> float(glu(keras.ops.array([3.0, 0.0], "float16"))[0])
    1.5
    """
    return ops.glu(x, axis=axis)


@_activation(at=100.0, gives=100.0)
def softplus(x: Any) -> Any:
    """Compute `log(exp(x) + 1)`."""
    return ops.softplus(x)


@_activation(at=3.0, gives=0.75)
def softsign(x: Any) -> Any:
    """Compute `x / (abs(x) + 1)`."""
    return ops.softsign(x)


@_activation(
    "[Barron, 2021](https://arxiv.org/abs/2112.11687)",
    at=1000.0,
    gives=1000.0,
    b="The smoothness. Defaults to 4.",
)
def squareplus(x: Any, b: float = 4) -> Any:
    """Compute `(x + sqrt(x**2 + b)) / 2`."""
    return ops.squareplus(x, b=b)


@_activation(at=0.0, gives=0.25)
def sparse_plus(x: Any) -> Any:
    """Compute 0 for `x <= -1`, `(x + 1)**2 / 4` for `-1 < x < 1`, and `x` for `x >= 1`."""
    return ops.sparse_plus(x)


@_activation(at=0.0, gives=0.5)
def sparse_sigmoid(x: Any) -> Any:
    """Compute 0 for `x <= -1`, `(x + 1) / 2` for `-1 < x < 1`, and 1 for `x >= 1`."""
    return ops.sparse_sigmoid(x)


@_activation(
    "[Clevert et al., 2015](https://arxiv.org/abs/1511.07289)",
    at=-100.0,
    gives=-1.0,
    alpha="The slope at 0 from below. Defaults to 1.",
)
def elu(x: Any, alpha: float = 1.0) -> Any:
    """Compute `x` for `x > 0`, and `alpha * (exp(x) - 1)` elsewhere."""
    return ops.elu(x, alpha=alpha)


@_activation(
    "[Barron, 2017](https://arxiv.org/abs/1704.07483)",
    at=-100.0,
    gives=-1.0,
    alpha="The negative of the smallest value. Defaults to 1.",
)
def celu(x: Any, alpha: float = 1.0) -> Any:
    """Compute `x` for `x > 0`, and `alpha * (exp(x / alpha) - 1)` elsewhere."""
    return ops.celu(x, alpha=alpha)


@_activation("[Klambauer et al., 2017](https://arxiv.org/abs/1706.02515)", at=1.0, gives=1.05078125)
def selu(x: Any) -> Any:
    """Compute `1.0507 * elu(x, 1.6733)`."""
    return ops.selu(x)


@_activation(at=0.0, gives=1.0)
def exponential(x: Any) -> Any:
    """Compute `exp(x)`."""
    return ops.exp(x)


# Keras has both names for each.
swish = silu
hard_swish = hard_silu
