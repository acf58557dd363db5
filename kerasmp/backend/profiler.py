"""Profiles calls of layers: their multiply-adds, casts and outputs.

Keras has no way to ask a layer for its work. All its layers call the functions of its backend, so
these are replaced during profiled eager calls, in each Keras module that has imported them. There
is no plainer way: frameworks count operations by kernel or graph node, and do not know the layer.
The replacements profile only in the context that asked for it. Elsewhere they call the original,
because other threads may call models, or profile their own, at the same time.
`tests/backend/test_profiler.py` fails if one of the private names moves.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import keras
import keras.src.backend as keras_backend

from kerasmp.backend import current
from kerasmp.backend.flops import COUNTS, factors, size
from kerasmp.backend.keras_internals import AutocastScope
from kerasmp.backend.tensors import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kerasmp.backend.flops import Count

_FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_BYTES = {"bool": 1, "8": 1, "16": 2, "32": 4, "64": 8} | _FLOAT_BYTES


class Profile:
    """The work of each layer that was called, by `id(layer)`.

    Attributes:
        output_bytes: Bytes of the tensors that the layer returned, except those that it passed
            through. It has an entry for each layer that was called.
        multiply_adds: Multiply-adds by the dtype of the factors, of the layer itself and not of
            the layers inside it.
        uncounted: The layers that called a product in an unknown way.
        cast_bytes: Bytes written by casts between float dtypes, of the layer itself.
    """

    def __init__(self) -> None:
        self.output_bytes: dict[int, int] = {}
        self.multiply_adds: dict[int, dict[str, int]] = {}
        self.cast_bytes: dict[int, int] = {}
        self.uncounted: set[int] = set()
        self._running: list[int] = []
        self._in_product = self._in_cast = False
        self._returned: dict[int, Any] = {}

    # What follows takes its own parameters by position, since `kwargs` may have the same names.

    def call(self, original: Callable[..., Any], layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run and profile `keras.Layer.__call__`."""
        self._running.append(id(layer))
        try:
            outputs = original(layer, *args, **kwargs)
        finally:
            self._running.pop()
        written = sum(map(self._new_bytes, keras.tree.flatten(outputs)))
        _add(self.output_bytes, id(layer), written)
        return outputs

    def product(
        self, count: Count, original: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run and profile a product; the products that it calls itself are part of it."""
        if self._in_product or not self._running:
            return original(*args, **kwargs)
        self._in_product = True
        try:
            result = original(*args, **kwargs)
        finally:
            self._in_product = False
        values = [*args, *kwargs.values()]
        try:
            number = count(values, kwargs, result)
        except Exception:  # noqa: BLE001 - an unknown way to call it
            self.uncounted.add(self._running[-1])
            return result
        counts = self.multiply_adds.setdefault(self._running[-1], {})
        _add(counts, _dtype_of_factors(values), number)
        return result

    def cast(self, original: Callable[..., Any], /, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run and profile `cast` or `convert_to_tensor`; the casts that they call are part."""
        if self._in_cast or not self._running or not factors([x]):
            return original(x, *args, **kwargs)
        with self._casting():
            result = original(x, *args, **kwargs)
        self._add_cast(x, result)
        return result

    def read(self, original: Callable[..., Any], scope: Any, value: Any) -> Any:
        """Run and profile `AutocastScope.maybe_cast`, which casts a variable on each read."""
        with self._casting():
            result = original(scope, value)
        if self._running:
            self._add_cast(value, result)
        return result

    @contextlib.contextmanager
    def _casting(self) -> Iterator[None]:
        before, self._in_cast = self._in_cast, True
        try:
            yield
        finally:
            self._in_cast = before

    def _add_cast(self, x: Any, result: Any) -> None:
        dtypes = {dtype_name(x.dtype), dtype_name(result.dtype)}
        if len(dtypes) > 1 and dtypes <= _FLOAT_BYTES.keys():
            _add(self.cast_bytes, self._running[-1], _bytes(result))

    def _new_bytes(self, tensor: Any) -> int:
        # By identity: a container returns the tensors of the layers inside it.
        if not keras.ops.is_tensor(tensor) or id(tensor) in self._returned:
            return 0
        forget = functools.partial(_drop, self._returned, id(tensor))
        self._returned[id(tensor)] = weakref.ref(tensor, forget)
        return _bytes(tensor)


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Profile all layers that are called, which run eagerly and without gradients.

    It sees products and casts by Keras's functions, and products by the framework's functions of
    the same names. It does not see operators such as `@` between tensors.

    Example:

    >>> layer = keras.layers.Dense(3, dtype="mixed_float16")
    >>> layer.build((None, 4))
    >>> with profile() as seen:
    ...     outputs = layer(keras.ops.ones((2, 4)))
    >>> seen.multiply_adds[id(layer)], seen.output_bytes[id(layer)]
    ({'float16': 24}, 12)
    """
    active = Profile()
    with _REPLACEMENTS, current().eager_scope():
        token = _ACTIVE.set(active)
        try:
            yield active
        finally:
            _ACTIVE.reset(token)


# The profile that is active in this context, or None.
_ACTIVE: ContextVar[Profile | None] = ContextVar("active", default=None)


class _Replacements:
    """Replaces the functions while any thread is profiling."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                try:
                    _replace_all(self._undo)
                except BaseException:  # includes an interrupt
                    self._undo.close()
                    raise
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo.close()


_REPLACEMENTS = _Replacements()


def _replace_all(undo: contextlib.ExitStack) -> None:
    for function, count in _products():
        _replace_in_keras(function, _profiled_product(function, count), undo)
    for module, name in current().MATMUL_FUNCTIONS:
        _set(module, name, _profiled_product(getattr(module, name), COUNTS[name]), undo)
    for function in (keras_backend.cast, keras_backend.convert_to_tensor):
        _replace_in_keras(function, _if_active(function, Profile.cast), undo)
    methods: list[tuple[Any, str, Callable[..., Any]]] = [
        (AutocastScope, "maybe_cast", Profile.read),
        (keras.Layer, "__call__", Profile.call),
        *current().COMPILED_CALLS,
    ]
    for owner, name, profiled in methods:
        _set(owner, name, _if_active(getattr(owner, name), profiled), undo)


def _profiled_product(function: Callable[..., Any], count: Count) -> Callable[..., Any]:
    def product(profile: Profile, /, *args: Any, **kwargs: Any) -> Any:
        return profile.product(count, *args, **kwargs)

    return _if_active(function, product)


def _if_active(original: Callable[..., Any], profiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `profiled(profile, original, ...)` while a profile is active."""

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        active = _ACTIVE.get()
        if active is None:
            return original(*args, **kwargs)
        return profiled(active, original, *args, **kwargs)

    return either


def _products() -> list[tuple[Callable[..., Any], Count]]:
    modules = (keras_backend.numpy, keras_backend.nn, keras_backend)
    return [
        (getattr(module, name), count)
        for name, count in COUNTS.items()
        for module in modules
        if hasattr(module, name)
    ]


def _replace_in_keras(
    function: Callable[..., Any], by: Callable[..., Any], undo: contextlib.ExitStack
) -> None:
    """Replace a function in each Keras module that holds it, whichever way it was imported."""
    # The undo searches again: a module that is imported in the meantime imports the replacement.
    undo.callback(_put_into_keras, function, by)
    _put_into_keras(by, function)


def _put_into_keras(new: Callable[..., Any], old: Callable[..., Any]) -> None:
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "keras"]
    for module in modules:
        for name in [name for name, value in list(vars(module).items()) if value is old]:
            setattr(module, name, new)


def _set(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _drop(kept: dict[int, Any], key: int, _: Any) -> None:
    kept.pop(key, None)


def _add(numbers: dict[Any, int], key: Any, number: int) -> None:
    numbers[key] = numbers.get(key, 0) + number


def _dtype_of_factors(values: list[Any]) -> str:
    dtypes = [dtype_name(x.dtype) for x in factors(values)[:2]]
    return dtypes[0] if len(set(dtypes)) == 1 else str(keras.backend.result_type(*dtypes))


def _bytes(tensor: Any) -> int:
    dtype = dtype_name(tensor.dtype)
    known = [width for name, width in _BYTES.items() if dtype == name or dtype.endswith(name)]
    return size(tensor) * (known[0] if known else 1)  # such as float8_e4m3fn
