"""Values kept for models, layers and optimizers, whose classes may be user-defined."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ByIdentity(Generic[T]):
    """Maps objects to values by identity, for as long as the objects live.

    It keeps no object alive, unless a value refers to its own object.

    Python's weak sets and dictionaries compare objects by their `__eq__` and `__hash__`. A
    user-defined class may have an `__eq__` with another meaning, and then no `__hash__`.

    Example:

    >>> one, known = ByIdentity(), ByIdentity()
    >>> known[one] = "seen"
    >>> known.get(one), known.get(ByIdentity()), len(known)
    ('seen', None, 1)
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def get(self, key: Any) -> T | None:
        """Return the value of an object, or None if it has none."""
        return self._values.get(id(key))

    def __setitem__(self, key: Any, value: T) -> None:
        """Set the value of an object."""
        if id(key) not in self._values:
            weakref.finalize(key, self._values.pop, id(key), None).atexit = False
        self._values[id(key)] = value

    def __len__(self) -> int:
        """Return the number of objects with a value."""
        return len(self._values)
