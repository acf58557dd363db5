"""The only room that imports a framework, lazily, and the only one that touches Keras privates.

The module of the running backend comes from `current()`; importing `kerasmp` alone imports none.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import keras

__all__ = ["current"]


@functools.cache  # and so one call that AutoGraph, tracing a user's loop, leaves alone
def current() -> Any:
    """Return the module with the framework-specific parts for the running Keras backend.

    Returns:
        `kerasmp.backend.tensorflow`, `.jax` or `.torch`.
    """
    return importlib.import_module(f"{__name__}.{keras.backend.backend()}")
