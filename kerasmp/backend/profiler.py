"""Sees what a model computes while it is called: products, casts, and outputs of each layer.

There is no plain way to count what each layer multiplies, and in which dtype. Keras has neither
such a count nor a hook around its functions. XLA and TensorFlow count the operations of a whole
compiled program, where layers are no longer told apart, and torch's FlopCounterMode knows modules
but not dtypes. But Keras's layers all go through the functions of its backend, and those are
replaced while eager calls are watched, in each module of Keras that has them. What stands in their
place watches in the context alone that asked for it, and is the original everywhere else: other
threads may be calling models meanwhile, or watching one of their own.
`tests/backend/test_profiler.py` tells when one of the private names moves.
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kerasmp.backend.flops import Count

_FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_BYTES = {"bool": 1, "8": 1, "16": 2, "32": 4, "64": 8} | _FLOAT_BYTES


class Profile:
    """What was seen of each layer, by `id(layer)`; nothing of those that were not called.

    Attributes:
        output_bytes: Bytes of the tensors that it returned, less those that it handed on. The
            layers that were called are in it.
        multiply_adds: Multiplications that are added up, by the dtype of the factors, of its own
            and not of a layer inside it.
        uncounted: The layers with a product that was called in a way that is not known.
        cast_bytes: Bytes that casts from one float dtype to another wrote, likewise.
    """

    def __init__(self) -> None:
        self.output_bytes: dict[int, int] = {}
        self.multiply_adds: dict[int, dict[str, int]] = {}
        self.cast_bytes: dict[int, int] = {}
        self.uncounted: set[int] = set()
        self._running: list[int] = []
        self._in_product = self._in_cast = False
        self._returned: dict[int, Any] = {}

    def call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return `keras.Layer.__call__`, watched."""

        @functools.wraps(original)
        def watched_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            self._running.append(id(layer))
            try:
                outputs = original(layer, *args, **kwargs)
            finally:
                self._running.pop()
            written = sum(map(self._new_bytes, keras.tree.flatten(outputs)))
            _add(self.output_bytes, id(layer), written)
            return outputs

        return watched_call

    def product(self, original: Callable[..., Any], count: Count) -> Callable[..., Any]:
        """Return a product, watched; what it calls itself is part of it."""

        @functools.wraps(original)
        def watched_product(*args: Any, **kwargs: Any) -> Any:
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
            except Exception:  # noqa: BLE001 - a way to call it that is not known here
                self.uncounted.add(self._running[-1])
                return result
            counts = self.multiply_adds.setdefault(self._running[-1], {})
            _add(counts, _dtype_of_factors(values), number)
            return result

        return watched_product

    def cast(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return `cast` or `convert_to_tensor`, watched; what it calls itself is part of it."""

        @functools.wraps(original)
        def watched_cast(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self._in_cast or not self._running or not factors([x]):
                return original(x, *args, **kwargs)
            with self._casting():
                result = original(x, *args, **kwargs)
            self._add_cast(x, result)
            return result

        return watched_cast

    def read(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return `AutocastScope.maybe_cast`, watched: it casts a variable that a layer reads."""

        @functools.wraps(original)
        def watched_read(scope: Any, value: Any) -> Any:
            with self._casting():
                result = original(scope, value)
            if self._running:
                self._add_cast(value, result)
            return result

        return watched_read

    @contextlib.contextmanager
    def _casting(self) -> Iterator[None]:
        before, self._in_cast = self._in_cast, True
        try:
            yield
        finally:
            self._in_cast = before

    def _add_cast(self, x: Any, result: Any) -> None:
        dtypes = {_dtype(x), _dtype(result)}
        if len(dtypes) > 1 and dtypes <= _FLOAT_BYTES.keys():
            _add(self.cast_bytes, self._running[-1], _bytes(result))

    def _new_bytes(self, tensor: Any) -> int:
        # By identity: a container returns what a layer inside it has returned.
        if not keras.ops.is_tensor(tensor) or id(tensor) in self._returned:
            return 0
        forget = functools.partial(_drop, self._returned, id(tensor))
        self._returned[id(tensor)] = weakref.ref(tensor, forget)
        return _bytes(tensor)


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Watch all that layers do, which is done eagerly and without gradients.

    Seen are products and casts by Keras's functions, and products by the framework's functions of
    the same names. Not seen are those by operators, such as `@` between tensors.

    Example:

    >>> layer = keras.layers.Dense(3, dtype="mixed_float16")
    >>> layer.build((None, 4))
    >>> with profile() as seen:
    ...     outputs = layer(keras.ops.ones((2, 4)))
    >>> seen.multiply_adds[id(layer)], seen.output_bytes[id(layer)]
    ({'float16': 24}, 12)
    """
    seen = Profile()
    with _REPLACED, current().eagerly():
        before = _SEEN.set(seen)
        try:
            yield seen
        finally:
            _SEEN.reset(before)


# What watches in this context; None where nobody does.
_SEEN: ContextVar[Profile | None] = ContextVar("seen", default=None)


class _Replaced:
    """Replaces the functions as long as anybody watches, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watching = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._watching:
                try:
                    _replace_all(self._undo)
                except BaseException:  # an interrupt, too
                    self._undo.close()
                    raise
            self._watching += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._watching -= 1
            if not self._watching:
                self._undo.close()


_REPLACED = _Replaced()


def _replace_all(undo: contextlib.ExitStack) -> None:
    for function, count in _products():
        _replace_in_keras(function, _product(function, count), undo)
    for module, name in current().PRODUCTS:
        _set(module, name, _product(getattr(module, name), COUNTS[name]), undo)
    for function in (keras_backend.cast, keras_backend.convert_to_tensor):
        _replace_in_keras(function, _where_watched(function, Profile.cast), undo)
    for owner, name, watch in (
        (AutocastScope, "maybe_cast", Profile.read),
        (keras.Layer, "__call__", Profile.call),
        *current().COMPILED,
    ):
        _set(owner, name, _where_watched(getattr(owner, name), watch), undo)


def _product(function: Callable[..., Any], count: Count) -> Callable[..., Any]:
    return _where_watched(function, functools.partial(Profile.product, count=count))


def _where_watched(
    original: Callable[..., Any], watch: Callable[..., Callable[..., Any]]
) -> Callable[..., Any]:
    """Return `original`, but in a context that watches what `watch` makes of it."""

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        seen = _SEEN.get()
        return (original if seen is None else watch(seen, original))(*args, **kwargs)

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
    """Replace a function in each module of Keras that holds it, by whichever import."""
    # Looked for once more in the end: a module that comes meanwhile imports what it finds.
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


def _dtype(tensor: Any) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))


def _dtype_of_factors(values: list[Any]) -> str:
    dtypes = [_dtype(x) for x in factors(values)[:2]]
    return dtypes[0] if len(set(dtypes)) == 1 else str(keras.backend.result_type(*dtypes))


def _bytes(tensor: Any) -> int:
    dtype = _dtype(tensor)
    known = [width for name, width in _BYTES.items() if dtype == name or dtype.endswith(name)]
    return size(tensor) * (known[0] if known else 1)  # float8_e4m3fn and the like
