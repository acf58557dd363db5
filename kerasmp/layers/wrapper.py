"""Run any layer in a dtype of its own."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import ops

from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.errors import PolicyError, did_you_mean
from kerasmp.ops.precision import registered
from kerasmp.policy.spec import DTYPES


@registered
class WithDtype(keras.layers.Wrapper):
    """Runs a layer, and all layers inside it, in a given dtype.

    Keras's `dtype=` argument does this for a layer that you construct yourself. This wrapper does
    it for one that already exists or that has parts which `dtype=` does not reach (Bidirectional,
    MultiHeadAttention, a nested model).

    Args:
        layer: The layer. It is changed: it and its parts get the policy `dtype`.
        dtype: A Keras dtype policy or its name, default "float32". Inputs are cast to its compute
            dtype.
        output_dtype: Float dtype to cast the outputs to; default None leaves them as they are.
        **kwargs: As for `keras.layers.Layer`: `name`, `trainable`.

    Input shape:
        That of the layer. All its inputs are passed on; where non-tensor arguments go along, pass
        the tensors by position.

    Output shape:
        That of the layer.

    Raises:
        PolicyError: If `layer` is built and its variables have another dtype than the policy's, or
            if `output_dtype` is no float dtype.

    Example:

    >>> keras.config.set_dtype_policy("mixed_float16")
    >>> softmax = WithDtype(keras.layers.Softmax())
    >>> y = softmax(keras.ops.ones((1, 4), dtype="float16"))
    >>> keras.backend.standardize_dtype(y.dtype)
    'float32'
    >>> keras.config.set_dtype_policy("float32")
    """

    # For rules and conversions, which leave it and its parts alone.
    keeps_its_dtype = True

    def __init__(
        self, layer: Any, dtype: Any = "float32", output_dtype: str | None = None, **kwargs: Any
    ) -> None:
        if output_dtype is not None and output_dtype not in DTYPES:
            raise PolicyError(
                "Outputs cannot be cast to this.",
                received=f"output_dtype={output_dtype!r}",
                expected=f"{', '.join(DTYPES)} or None",
                fix=did_you_mean(str(output_dtype), DTYPES) or "None leaves them as they are.",
            )
        super().__init__(layer, dtype=dtype, **kwargs)
        wanted = self.variable_dtype
        # The variables themselves: a part may differ from the whole, and seeds are no floats.
        present = sorted(
            {v.dtype for v in layer.variables if keras.backend.is_float_dtype(v.dtype)}
        )
        if present not in ([], [wanted]):
            held = " and ".join(present)
            raise PolicyError(
                "The layer is built, its variables stay in the dtype they have.",
                received=f"variables in {held}, a policy that wants {wanted}",
                expected=f"a policy with {held} variables",
                fix='For low-precision compute over float32 variables use a "mixed_" policy.',
            )
        self._hand_on_policy()
        self.output_dtype = output_dtype
        self.supports_masking = layer.supports_masking

    def build(self, input_shape: Any = None) -> None:
        """Build the layer, if one shape is enough; one of several inputs builds when called."""
        parameters = inspect.signature(self.layer.build).parameters.values()
        if sum(parameter.default is parameter.empty for parameter in parameters) <= 1:
            super().build(input_shape)
            self._hand_on_policy()  # to parts that the layer makes when it is built

    def _hand_on_policy(self) -> None:
        for part in flatten_layers(self.layer):
            part.dtype_policy = self.dtype_policy

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        outputs = self.layer(inputs, *args, **kwargs)
        if self.output_dtype is None:
            return outputs
        return keras.tree.map_structure(self._cast_output, outputs)

    def _cast_output(self, tensor: Any) -> Any:
        is_float = keras.backend.is_float_dtype(tensor.dtype)
        return ops.cast(tensor, self.output_dtype) if is_float else tensor

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """Return the layer's mask."""
        return self.layer.compute_mask(inputs, previous_mask)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, serialised."""
        return {**super().get_config(), "output_dtype": self.output_dtype}
