"""The only room that imports a framework, lazily, and the only one that touches Keras privates.

The module of the running backend comes from `current()`; importing `kerasmp` alone imports none.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import keras

from kerasmp.errors import BackendError

__all__ = ["current"]

_SUPPORTED = ("tensorflow", "jax", "torch")


@functools.cache  # and so one call that AutoGraph, tracing a user's loop, leaves alone
def current() -> Any:
    """Return the module with the framework-specific parts for the running Keras backend.

    Returns:
        `kerasmp.backend.tensorflow`, `.jax` or `.torch`.
    """
    name = keras.backend.backend()
    if name not in _SUPPORTED:
        raise BackendError(
            "kerasmp has no part for this Keras backend.",
            received=repr(name),
            expected=", ".join(_SUPPORTED),
            fix="Set KERAS_BACKEND to one of them before Keras is imported.",
        )
    return importlib.import_module(f"{__name__}.{name}")
