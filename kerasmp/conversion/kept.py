"""Tensors that layers made when they were built, in the dtype of that time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

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
        for name, value in vars(layer).items()
        if keras.ops.is_tensor(value)
        and not isinstance(value, keras.Variable)
        and keras.backend.standardize_dtype(value.dtype) == compute_dtype
    ]
    return [
        f'"{row.path}" made the tensor `{name}` in {compute_dtype} when it was built, and keeps it '
        "so: cast it where it is used"
        for name in kept
    ]
