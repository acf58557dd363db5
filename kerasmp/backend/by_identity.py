"""What is known of models, layers and optimizers, whose classes may be a user's."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ByIdentity(Generic[T]):
    """Holds a value for each of some objects, for as long as they live.

    It keeps none alive, as long as no value reaches the object that it is of.

    Python's weak sets and dictionaries ask an object which one it is: a class of the user's own may
    have an `__eq__` that says something else, and then no `__hash__`.

    Example:

    >>> one, known = ByIdentity(), ByIdentity()
    >>> known[one] = "seen"
    >>> known.get(one), known.get(ByIdentity()), len(known)
    ('seen', None, 1)
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def get(self, key: Any) -> T | None:
        """Return the value of an object, None if it has none."""
        return self._values.get(id(key))

    def __setitem__(self, key: Any, value: T) -> None:
        """Give an object a value."""
        if id(key) not in self._values:
            weakref.finalize(key, self._values.pop, id(key), None).atexit = False
        self._values[id(key)] = value

    def __len__(self) -> int:
        """Return how many objects have a value."""
        return len(self._values)
