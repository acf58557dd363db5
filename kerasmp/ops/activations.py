"""Activations whose values and gradients are right in float16.

Each is that of `keras.activations`, with the same arguments and defaults, computed in float32; its
argument `x` is a tensor of any float dtype, and so is the result. Stock activations in float16
overflow on the way back (the product of a large gradient with `x` is inf, times 0 is NaN), or
compute their gradient from an output that was rounded to float16. They are registered with Keras:
a model with `Dense(8, activation=kerasmp.ops.gelu)` is saved and loaded like any other.

The rest of `keras.activations`, the relu family and the piecewise linear ones, is right as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp.docstrings import T, documented
from kerasmp.ops.precision import in_float32, registered

if TYPE_CHECKING:
    from collections.abc import Callable


def _activation(source: str = "", *, at: float, gives: float, **args: str) -> Callable[[T], T]:
    """Return a decorator that makes an activation of a formula, with a docstring.

    Args:
        source: Where the formula comes from, if that is known.
        at: A number, for an example.
        gives: The value there.
        **args: What the arguments besides `x` are.
    """
    document = documented(
        args={"x": "A tensor of any shape and float dtype; the result has both.", **args},
        references=source,
        example=f'>>> float({{name}}(keras.ops.array({at}, "float16")))\n{gives}',
    )
    return lambda function: registered(in_float32(document(function)))


@_activation(at=0.0, gives=0.5)
def sigmoid(x: Any) -> Any:
    """Return `1 / (1 + exp(-x))`."""
    return ops.sigmoid(x)


@_activation(at=-1000.0, gives=-1000.0)
def log_sigmoid(x: Any) -> Any:
    """Return `log(sigmoid(x))`."""
    return ops.log_sigmoid(x)


@_activation(at=0.0, gives=0.0)
def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent."""
    return ops.tanh(x)


@_activation(at=9.0, gives=8.0)
def tanh_shrink(x: Any) -> Any:
    """Return `x - tanh(x)`."""
    return ops.tanh_shrink(x)


@_activation(
    "[Hendrycks and Gimpel, 2016](https://arxiv.org/abs/1606.08415)",
    at=100.0,
    gives=100.0,
    approximate="Whether to use the approximation by tanh; default False.",
)
def gelu(x: Any, approximate: bool = False) -> Any:  # noqa: FBT001, FBT002 - as in Keras
    """Return `x` times the normal distribution function of `x`.

    As in `keras.activations`, and not as in `keras.ops`, the default is the exact form.
    """
    return ops.gelu(x, approximate=approximate)


@_activation("[Ramachandran et al., 2017](https://arxiv.org/abs/1710.05941)", at=100.0, gives=100.0)
def silu(x: Any) -> Any:
    """Return `x * sigmoid(x)`, which is also called swish."""
    return ops.silu(x)


@_activation("[Howard et al., 2019](https://arxiv.org/abs/1905.02244)", at=3.0, gives=3.0)
def hard_silu(x: Any) -> Any:
    """Return `x * hard_sigmoid(x)`, which is also called hard swish."""
    return ops.hard_silu(x)


@_activation("[Misra, 2019](https://arxiv.org/abs/1908.08681)", at=100.0, gives=100.0)
def mish(x: Any) -> Any:
    """Return `x * tanh(softplus(x))`."""
    return x * ops.tanh(ops.softplus(x))


@registered
@in_float32
def glu(x: Any, axis: int = -1) -> Any:
    """Return one half of `x` times the sigmoid of the other.

    Args:
        x: A tensor of any shape and float dtype, of even length along `axis`.
        axis: The axis to halve; default the last.

    Returns:
        A tensor of half that length there, in the dtype of `x`.

    References:
        [Dauphin et al., 2016](https://arxiv.org/abs/1612.08083)

    Example:

    >>> float(glu(keras.ops.array([3.0, 0.0], "float16"))[0])
    1.5
    """
    return ops.glu(x, axis=axis)


@_activation(at=100.0, gives=100.0)
def softplus(x: Any) -> Any:
    """Return `log(exp(x) + 1)`."""
    return ops.softplus(x)


@_activation(at=3.0, gives=0.75)
def softsign(x: Any) -> Any:
    """Return `x / (abs(x) + 1)`."""
    return ops.softsign(x)


@_activation(
    "[Barron, 2021](https://arxiv.org/abs/2112.11687)",
    at=1000.0,
    gives=1000.0,
    b="The smoothness; default 4.",
)
def squareplus(x: Any, b: float = 4) -> Any:
    """Return `(x + sqrt(x**2 + b)) / 2`."""
    return ops.squareplus(x, b=b)


@_activation(at=0.0, gives=0.25)
def sparse_plus(x: Any) -> Any:
    """Return 0 up to -1, `(x + 1)**2 / 4` up to 1, and `x` from there."""
    return ops.sparse_plus(x)


@_activation(at=0.0, gives=0.5)
def sparse_sigmoid(x: Any) -> Any:
    """Return 0 up to -1, `(x + 1) / 2` up to 1, and 1 from there."""
    return ops.sparse_sigmoid(x)


@_activation(
    "[Clevert et al., 2015](https://arxiv.org/abs/1511.07289)",
    at=-100.0,
    gives=-1.0,
    alpha="The slope at 0 from below; default 1.",
)
def elu(x: Any, alpha: float = 1.0) -> Any:
    """Return `x` where it is positive, `alpha * (exp(x) - 1)` elsewhere."""
    return ops.elu(x, alpha=alpha)


@_activation(
    "[Barron, 2017](https://arxiv.org/abs/1704.07483)",
    at=-100.0,
    gives=-1.0,
    alpha="Minus the least value; default 1.",
)
def celu(x: Any, alpha: float = 1.0) -> Any:
    """Return `x` where it is positive, `alpha * (exp(x / alpha) - 1)` elsewhere."""
    return ops.celu(x, alpha=alpha)


@_activation("[Klambauer et al., 2017](https://arxiv.org/abs/1706.02515)", at=1.0, gives=1.05078125)
def selu(x: Any) -> Any:
    """Return `1.0507 * elu(x, 1.6733)`."""
    return ops.selu(x)


@_activation(at=0.0, gives=1.0)
def exponential(x: Any) -> Any:
    """Return `exp(x)`."""
    return ops.exp(x)


# Keras knows these under both names.
swish = silu
hard_swish = hard_silu
