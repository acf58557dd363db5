"""Tensors of the backend: their dtypes, and NumPy arrays for `kerasmp.probe.compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.keras_internals import copy_mask
from kerasmp.policy.spec import HALVES
from kerasmp.probe.compare import compare

if TYPE_CHECKING:
    from kerasmp.probe.compare import Comparison


def compare_tensors(half: Any, wide: Any, dtype: str | None = None) -> Comparison:
    """Compare a tensor with the same tensor in float32; see `compare`.

    Args:
        half: The tensor.
        wide: The tensor in float32.
        dtype: The dtype in which `half` was computed; None for its own dtype.
    """
    own = dtype or str(keras.backend.standardize_dtype(half.dtype))
    return compare(to_numpy(half), to_numpy(wide), own if own in HALVES else "float32")


def to_numpy(tensor: Any) -> Any:
    """Return a tensor as an array, in float32 if it is bfloat16, which NumPy lacks."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return keras.ops.convert_to_numpy(tensor)


def is_float(each: Any) -> bool:
    """Return whether something is a tensor of floats."""
    return bool(keras.ops.is_tensor(each)) and bool(
        keras.backend.is_float_dtype(keras.backend.standardize_dtype(each.dtype))
    )


def widen(each: Any) -> Any:
    """Cast a tensor in half precision to float32, and keep its mask; return anything else."""
    if not is_float(each) or keras.backend.standardize_dtype(each.dtype) not in HALVES:
        return each
    return copy_mask(each, keras.ops.cast(each, "float32"))


def nonfinite(array: Any) -> int:
    """Return how many values of an array are inf or NaN."""
    if array.dtype.kind not in "fV":
        return 0
    return int(array.size - np.count_nonzero(np.isfinite(array.astype("float32"))))
