"""The only package that imports a framework, lazily, and the only one that touches Keras privates.

What differs between backends comes from `current()`, a `Backend`; importing `kerasmp` alone imports
none that Keras has not imported.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import keras

from kerasmp.errors import BackendError

if TYPE_CHECKING:
    from kerasmp.backend.protocol import Backend

__all__ = [
    "without_autograph",
    "compares_in_float32",
    "current",
    "draws_dropout_in_compute_dtype",
    "layers_without_kernel",
    "draws_noise_in_compute_dtype",
    "multiplies_mixed_dtypes",
    "sums_rows_in_table_dtype",
    "trace",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_CLASSES = {"tensorflow": "TensorFlow", "jax": "Jax", "torch": "Torch"}


@functools.cache
def current() -> Backend:
    """Return the framework-specific parts for the running Keras backend."""
    name = keras.backend.backend()
    if name not in _CLASSES:
        raise BackendError(
            "kerasmp has no part for this Keras backend.",
            received=repr(name),
            expected=", ".join(_CLASSES),
            fix="Set KERAS_BACKEND to one of them before Keras is imported.",
        )
    module = importlib.import_module(f"{__name__}.{name}")
    backend: Backend = getattr(module, _CLASSES[name])()
    return backend


def multiplies_mixed_dtypes() -> bool:
    """Return whether a product takes a float32 tensor and a float16 one; also without a backend."""
    name: str = keras.backend.backend()
    return name != "torch"


def sums_rows_in_table_dtype() -> bool:
    """Return whether a row that is taken twice has a gradient summed in the dtype of the table.

    Also without a backend.
    """
    name: str = keras.backend.backend()
    return name != "tensorflow"


def compares_in_float32(value: Any) -> bool:
    """Return whether Keras compares a narrower tensor with `value` in float32.

    Args:
        value: A number, or an array of them. JAX and torch go by the tensor where it is a number of
            Python's, and torch where it is any number.
    """
    shape = getattr(value, "shape", None)
    on_jax = keras.backend.backend() == "jax" and shape is not None
    return keras.backend.backend() == "tensorflow" or on_jax or bool(shape)


def draws_dropout_in_compute_dtype() -> bool:
    """Return whether dropout of a tensor draws numbers in the tensor's dtype."""
    return bool(keras.backend.backend() == "tensorflow")


def draws_noise_in_compute_dtype() -> bool:
    """Return whether normal numbers in half precision are made from uniform ones in it."""
    return bool(keras.backend.backend() == "jax")


@functools.cache
def layers_without_kernel(dtype: str) -> tuple[type, ...]:
    """Return the stock layers that fail in a dtype on this backend; none without a backend.

    Args:
        dtype: "float16", say.
    """
    if keras.backend.backend() not in _CLASSES:
        return ()
    found = (getattr(keras.layers, name, None) for name in current().without_kernel(dtype))
    return tuple(layer for layer in found if layer is not None)  # an older Keras lacks some


def trace(call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:
    """Trace a call as `Backend.trace` does; without a backend, as Keras does."""
    if keras.backend.backend() in _CLASSES:
        current().trace(call, args, kwargs, backwards=backwards)
    else:
        keras_internals = importlib.import_module(f"{__name__}.keras_internals")
        keras_internals.compute_output_spec(call, *args, **kwargs)


def without_autograph(function: _F) -> _F:
    """Return a function that AutoGraph, tracing a user's `tf.function`, leaves as it is written.

    It rewrites the sources of all that is called there, except those of Keras, whose name it knows:
    for one step of ours that takes longer than to trace the whole model. What the function calls is
    left alone with it, as what Keras calls is.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    autograph = importlib.import_module("tensorflow").autograph
    written: _F = autograph.experimental.do_not_convert(function)
    return written
