"""Watches the calls of layers.

Keras has no hook around the call of a layer that also sees what the layer is given before it casts
it, so `keras.Layer.__call__` is replaced while any thread watches. The replacement acts only in the
context that asked for it, because other threads may call models at the same time.
`tests/backend/test_layer_calls.py` fails if a layer is called in another way.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # Called as `watcher(call, layer, args, kwargs)`; returns what the layer returns.
    Watcher = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]

_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_LOCK = threading.Lock()
_users = 0
_originals: list[Any] = []  # the methods of keras.Layer, while any thread watches


@contextlib.contextmanager
def watch_calls(watcher: Watcher | None) -> Iterator[None]:
    """Call `watcher(call, layer, args, kwargs)` instead of each layer; None: call layers as usual.

    Inside the watcher, layers are called as usual, until it asks for something else itself.

    Example:

    >>> def watcher(call, layer, args, kwargs):
    ...     print(layer.name)
    ...     return call(layer, *args, **kwargs)
    >>> with watch_calls(watcher):
    ...     outputs = keras.layers.Flatten(name="flat")(keras.ops.ones((2, 3)))
    flat
    """
    _install()
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)
        _remove()


def _install() -> None:
    global _users, _originals  # noqa: PLW0603 - one patch for all threads
    with _LOCK:
        if not _users:
            _originals = [keras.Layer.__call__, keras.Layer.stateless_call]
            keras.Layer.__call__ = _watched(keras.Layer.__call__)
            keras.Layer.stateless_call = _watched_stateless(keras.Layer.stateless_call)
        _users += 1


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        watcher = _WATCHER.get()
        if watcher is None:
            return original(layer, *args, **kwargs)
        token = _WATCHER.set(None)
        try:
            return watcher(original, layer, args, kwargs)
        finally:
            _WATCHER.reset(token)

    return call


def _watched_stateless(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `stateless_call` that is watched as `__call__` is, which it does not call."""

    @functools.wraps(original)
    def stateless_call(
        layer: Any, trainable: Any, others: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        rest: tuple[Any, ...] = ()

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal rest
            outputs, *rest = original(layer, trainable, others, *args, **kwargs)
            return outputs

        outputs = _watched(call)(layer, *args, **kwargs)
        return (outputs, *rest)

    return stateless_call


def _remove() -> None:
    global _users  # noqa: PLW0603 - see above
    with _LOCK:
        _users -= 1
        if not _users:
            keras.Layer.__call__, keras.Layer.stateless_call = _originals


def takes_training(layer: Any) -> bool:
    """Return whether the `call` of a layer has an argument `training`."""
    return "training" in inspect.signature(layer.call).parameters
