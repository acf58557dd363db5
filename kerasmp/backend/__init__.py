"""Everything that differs between frameworks or is private in Keras.

No other package imports a framework or uses Keras's private names. `current()` returns the running
`Backend` and imports its framework only then, so `import kerasmp` imports nothing that Keras has
not imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import keras

from kerasmp.errors import BackendError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kerasmp.backend.protocol import Backend

__all__ = [
    "compares_in_float32",
    "current",
    "draws_dropout_in_compute_dtype",
    "draws_noise_in_compute_dtype",
    "layers_without_kernel",
    "multiplies_mixed_dtypes",
    "probe_scope",
    "resizes_gradients_in_float32",
    "sums_rows_in_table_dtype",
    "trace",
    "without_autograph",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_CLASSES = {"tensorflow": "TensorFlow", "jax": "Jax", "torch": "Torch"}


@functools.cache
def current() -> Backend:
    """Return the `Backend` for the running Keras backend."""
    name = keras.backend.backend()
    if name not in _CLASSES:
        raise BackendError(
            "kerasmp does not support this Keras backend.",
            received=repr(name),
            expected=", ".join(_CLASSES),
            fix="Set KERAS_BACKEND to one of them before you import Keras.",
        )
    module = importlib.import_module(f"{__name__}.{name}")
    backend: Backend = getattr(module, _CLASSES[name])()
    return backend


# What follows also works with a Keras backend that kerasmp does not support, such as NumPy.


def multiplies_mixed_dtypes() -> bool:
    """Return whether a matrix product accepts a float32 and a float16 tensor."""
    name: str = keras.backend.backend()
    return name != "torch"


def resizes_gradients_in_float32() -> bool:
    """Return whether the gradient of resized half-precision images may be float32, an error."""
    name: str = keras.backend.backend()
    return name == "tensorflow"


def sums_rows_in_table_dtype() -> bool:
    """Return whether the gradient of a row that is taken twice is summed in the table's dtype."""
    name: str = keras.backend.backend()
    return name != "tensorflow"


def compares_in_float32(value: Any) -> bool:
    """Return whether Keras compares a narrower tensor with `value` in float32.

    Args:
        value: A number or an array. JAX uses the tensor's dtype if it is a Python number, torch if
            it is a scalar of any kind.
    """
    shape = getattr(value, "shape", None)
    on_jax = keras.backend.backend() == "jax" and shape is not None
    return keras.backend.backend() == "tensorflow" or on_jax or bool(shape)


def draws_dropout_in_compute_dtype() -> bool:
    """Return whether dropout draws its random numbers in the dtype of its inputs."""
    return bool(keras.backend.backend() == "tensorflow")


def draws_noise_in_compute_dtype() -> bool:
    """Return whether half-precision normal noise is made from half-precision uniform numbers."""
    return bool(keras.backend.backend() == "jax")


@functools.cache
def layers_without_kernel(dtype: str) -> tuple[type, ...]:
    """Return the stock layers that fail in a dtype on this backend.

    Args:
        dtype: For example "float16".
    """
    if keras.backend.backend() not in _CLASSES:
        return ()
    names = current().layers_without_kernel(dtype)
    found = (getattr(keras.layers, name, None) for name in names)
    return tuple(layer for layer in found if layer is not None)  # an older Keras lacks some


def trace(call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:
    """Trace a call; see `Backend.trace`. On an unsupported backend, Keras traces it."""
    if keras.backend.backend() in _CLASSES:
        current().trace(call, args, kwargs, backwards=backwards)
    else:
        keras_internals = importlib.import_module(f"{__name__}.keras_internals")
        keras_internals.compute_output_spec(call, *args, **kwargs)


def probe_scope() -> AbstractContextManager[Any]:
    """Return a scope for running layers once, in which no gradients are recorded."""
    if keras.backend.backend() not in _CLASSES:
        return contextlib.nullcontext()
    return current().probe_scope()


def without_autograph(function: _F) -> _F:
    """Return a function that AutoGraph does not convert when it traces a user's `tf.function`.

    AutoGraph converts the source of everything that is called there, except of Keras, which it
    knows by name. For one kerasmp step, that takes longer than tracing the whole model. Functions
    that this one calls are not converted either, as with those that Keras calls.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    autograph = importlib.import_module("tensorflow").autograph
    unconverted: _F = autograph.experimental.do_not_convert(function)
    return unconverted
