"""What runs in this context: a train step, of which other code must know something."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclasses.dataclass
class Call:
    """One train step of a model.

    Attributes:
        model: The model.
        by_keras: Whether Keras's own step has its part in it.
        losses: The unscaled losses that its metrics were given, in order.
    """

    model: Any
    by_keras: bool = False
    losses: list[Any] = dataclasses.field(default_factory=list)


# Replicas of MirroredStrategy have a thread each, and so each a context of its own.
_RUNNING: contextvars.ContextVar[tuple[Call, ...]] = contextvars.ContextVar("_RUNNING", default=())


def running(model: Any) -> Call | None:
    """Return the train step of a model that runs here, or None."""
    return next((call for call in _RUNNING.get() if call.model is model), None)


@contextlib.contextmanager
def entered(model: Any) -> Iterator[Call]:
    """Let a train step of a model run here."""
    call = Call(model)
    token = _RUNNING.set((*_RUNNING.get(), call))
    try:
        yield call
    finally:
        _RUNNING.reset(token)
