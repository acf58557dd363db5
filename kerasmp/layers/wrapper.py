"""A wrapper that runs any layer in another dtype."""

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
    """Runs a layer, and all layers inside it, under a given dtype policy.

    For a layer that you construct yourself, Keras's `dtype` argument does this. Use this wrapper
    for a layer that exists already, or whose inner layers `dtype` does not reach (Bidirectional,
    MultiHeadAttention, a nested model).

    Args:
        layer: The layer to wrap. The policy of this layer and of all layers inside is changed.
        dtype: A Keras dtype policy or its name. Inputs are cast to its compute dtype. Defaults to
            "float32".
        output_dtype: The float dtype to cast the outputs to. Defaults to `None`, for no cast.
        **kwargs: Arguments of `keras.layers.Layer`: `name`, `trainable`.

    Input shape:
        Same as the wrapped layer. If you also pass arguments that are not tensors, pass the tensors
        by position.

    Output shape:
        Same as the wrapped layer.

    Raises:
        PolicyError: If `layer` is built and its variables do not have the variable dtype of the
            policy, or if `output_dtype` is not a float dtype.

    Example:

    >>> keras.config.set_dtype_policy("mixed_float16")
    >>> softmax = WithDtype(keras.layers.Softmax())
    >>> y = softmax(keras.ops.ones((1, 4), dtype="float16"))
    >>> keras.backend.standardize_dtype(y.dtype)
    'float32'
    >>> keras.config.set_dtype_policy("float32")
    """

    # Rules and conversions skip the layer and all layers inside.
    keeps_its_dtype = True

    def __init__(
        self, layer: Any, dtype: Any = "float32", output_dtype: str | None = None, **kwargs: Any
    ) -> None:
        if output_dtype is not None and output_dtype not in DTYPES:
            raise PolicyError(
                "`output_dtype` is not a float dtype.",
                received=f"output_dtype={output_dtype!r}",
                expected=f"{', '.join(DTYPES)} or None",
                fix=did_you_mean(str(output_dtype), DTYPES) or "Use None for no cast.",
            )
        super().__init__(layer, dtype=dtype, **kwargs)
        wanted = self.variable_dtype
        # Not the policies: inner layers may differ from the layer. Seeds are integers.
        present = sorted(
            {v.dtype for v in layer.variables if keras.backend.is_float_dtype(v.dtype)}
        )
        if present not in ([], [wanted]):
            held = " and ".join(present)
            raise PolicyError(
                "The layer is built, and the dtype of its variables cannot change.",
                received=f"{held} variables, and a policy with {wanted} variables",
                expected=f"a policy with {held} variables",
                fix='To compute in low precision with float32 variables, use a "mixed_" policy.',
            )
        self._propagate_policy()
        self.output_dtype = output_dtype
        self.supports_masking = layer.supports_masking

    def build(self, input_shape: Any = None) -> None:
        """Build the wrapped layer, unless it has several inputs: then its first call builds it."""
        parameters = inspect.signature(self.layer.build).parameters.values()
        if sum(parameter.default is parameter.empty for parameter in parameters) <= 1:
            super().build(input_shape)
            self._propagate_policy()  # to the layers that `build` has created

    def _propagate_policy(self) -> None:
        for part in flatten_layers(self.layer):
            part.dtype_policy = self.dtype_policy

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped layer."""
        outputs = self.layer(inputs, *args, **kwargs)
        if self.output_dtype is None:
            return outputs
        return keras.tree.map_structure(self._cast_output, outputs)

    def _cast_output(self, tensor: Any) -> Any:
        is_float = keras.backend.is_float_dtype(tensor.dtype)
        return ops.cast(tensor, self.output_dtype) if is_float else tensor

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """Return the mask of the wrapped layer."""
        return self.layer.compute_mask(inputs, previous_mask)

    def get_config(self) -> dict[str, Any]:
        """Return the config of the layer."""
        return {**super().get_config(), "output_dtype": self.output_dtype}
