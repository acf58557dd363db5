"""What the layers share: how they are registered and documented, and mixins for Keras's layers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.docstrings import T, documented
from kerasmp.ops import in_float32
from kerasmp.ops.precision import registered

if TYPE_CHECKING:
    from collections.abc import Callable


def drop_in(  # noqa: PLR0913 - Keras's signature
    prose: str = "",
    *,
    inputs: str = "Any shape",
    outputs: str = "Same as the input",
    raises: dict[str, str] | None = None,
    source: str = "",
    example: str = "",
    **args: str,
) -> Callable[[T], T]:
    """Return a decorator that registers a layer and completes its docstring.

    The layer is a drop-in replacement for the Keras layer of the same name.

    Args:
        prose: A paragraph about the layer.
        inputs: The shape of the inputs.
        outputs: The shape of the outputs.
        raises: When the layer raises an error, by the name of the error.
        source: The paper that introduced the layer.
        example: The lines of the example. By default, those that the docstring has.
        **args: The descriptions of constructor arguments. Those left out are described by Keras.
    """
    document = documented(
        prose,
        args={**args, "**kwargs": "Other arguments of `keras.layers.{name}`."},
        input_shape=f"{inputs}, in any float dtype.",
        output_shape=f"{outputs}, in the policy's compute dtype.",
        raises=raises or {},
        references=source,
        example=example,
    )
    return lambda cls: registered(document(cls))


class Float32Call(keras.layers.Layer):
    """A mixin, listed before a Keras layer, that computes `call` and its gradient in float32.

    Inputs, outputs and their gradients keep the policy's compute dtype, so memory traffic stays
    low. With `dtype="float32"` they would be float32 as well.
    """

    def call(self, inputs: Any) -> Any:
        """Compute the Keras layer in float32."""
        return in_float32(super().call)(inputs)


class Float32Weights(keras.layers.Layer):
    """A mixin, listed before a Keras layer, that excludes its weights from autocasting.

    The weights are float32 in `call`, so their gradients are summed in float32.
    """

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Add a weight that is not autocast."""
        return super().add_weight(*args, **{**kwargs, "autocast": False})


class Quantizable(keras.layers.Layer):
    """A mixin, listed before a Keras layer, whose subclasses Keras refuses to quantize."""

    def quantize(self, mode: Any = None, type_check: bool = True, **kwargs: Any) -> None:  # noqa: FBT001, FBT002 - Keras's signature
        """Quantize the layer in place, as in Keras."""
        # A user's subclass may compute something else, so Keras's check stays for it.
        is_own = type(self).__module__.partition(".")[0] == __name__.partition(".")[0]
        super().quantize(mode, type_check=type_check and not is_own, **kwargs)


def without_type_check(quantize: Callable[..., None]) -> Callable[..., None]:
    """Wrap the bound `quantize` of a stock layer whose class was replaced by one of this package.

    Keras binds the method when the layer is created, and the bound one accepts only its own class.
    """

    @functools.wraps(quantize)
    def unchecked(*args: Any, **kwargs: Any) -> None:
        quantize(*args, **{**kwargs, "type_check": False})

    return unchecked
