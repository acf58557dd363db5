"""What stays in the dtype of the time when a model was built: tensors, and inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_private import flatten_layers, own_attributes
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from kerasmp.policy.assign import Assignment


def kept_tensors(row: Assignment, compute_dtype: str) -> list[str]:
    """Say which tensors in a layer's attributes did not follow, in words.

    Those of Keras's own Normalization do (`kerasmp.policy.apply`). What a user's layer keeps is
    theirs to make anew.

    Args:
        row: The layer, which follows its new policy now.
        compute_dtype: The dtype that it computed in before.
    """
    layer = row.layer
    if layer.compute_dtype == compute_dtype:
        return []
    kept = [
        name
        for name, value in own_attributes(layer).items()
        if hasattr(value, "dtype")  # to ask Keras takes long
        and keras.ops.is_tensor(value)
        and not isinstance(value, keras.Variable)
        and keras.backend.standardize_dtype(value.dtype) == compute_dtype
    ]
    return [
        f'"{row.path}" made the tensor `{name}` in {compute_dtype} when it was built, and keeps it '
        "so: cast it where it is used"
        for name in kept
    ]


def narrow_inputs(model: Any) -> list[str]:
    """Say which inputs round what they are given before any layer sees it, in words.

    Keras gives a Sequential without `Input` one of the dtype that its first layer computes in, and
    a conversion changes no input: a user may have chosen its dtype for the data.

    Args:
        model: The model.
    """
    return [
        f'the input "{layer.name}" is {layer.dtype} and rounds what it is given, whatever the '
        "layers compute in: build the model with keras.Input for another"
        for layer in flatten_layers(model)
        if isinstance(layer, keras.layers.InputLayer) and layer.dtype in HALVES
    ]
