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
        of_keras: Whether it is that part.
        losses: The unscaled losses that its metrics were given, in order.
        scaled: The optimizers that it has asked for their scale.
        unscaled: Those that have taken its gradients for those of an unscaled loss.
    """

    model: Any
    by_keras: bool = False
    of_keras: bool = False
    losses: list[Any] = dataclasses.field(default_factory=list)
    scaled: list[Any] = dataclasses.field(default_factory=list)
    unscaled: list[Any] = dataclasses.field(default_factory=list)


# Replicas of MirroredStrategy have a thread each, and so each a context of its own.
_RUNNING: contextvars.ContextVar[tuple[Call, ...]] = contextvars.ContextVar("_RUNNING", default=())


def running(model: Any) -> Call | None:
    """Return the train step of a model that runs here, or None."""
    return next((call for call in _RUNNING.get() if call.model is model), None)


def innermost_step() -> Call | None:
    """Return the train step that runs here and in which no other one runs, or None."""
    return next(reversed(_RUNNING.get()), None)


@contextlib.contextmanager
def entered(model: Any, *, of_keras: bool = False) -> Iterator[Call]:
    """Let a train step of a model run here, the user's own or Keras's part in it."""
    call = Call(model, of_keras=of_keras)
    token = _RUNNING.set((*_RUNNING.get(), call))
    try:
        yield call
    finally:
        _RUNNING.reset(token)
