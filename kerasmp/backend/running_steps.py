"""The train steps that run in this context, for code that needs to know about them."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclasses.dataclass
class RunningStep:
    """A train step of a model.

    Attributes:
        model: The model.
        by_keras: Whether Keras's own train step runs inside it.
        of_keras: Whether it is that inner step.
        losses: The unscaled losses that the model's metrics received, in order.
        scaled: The optimizers that the step has asked for their scale.
        unscaled: The optimizers that took its gradients for those of an unscaled loss.
    """

    model: Any
    by_keras: bool = False
    of_keras: bool = False
    losses: list[Any] = dataclasses.field(default_factory=list)
    scaled: list[Any] = dataclasses.field(default_factory=list)
    unscaled: list[Any] = dataclasses.field(default_factory=list)


# Replicas of MirroredStrategy run in a thread each, so each has its own context.
_RUNNING: contextvars.ContextVar[tuple[RunningStep, ...]] = contextvars.ContextVar(
    "_RUNNING", default=()
)


def running_step(model: Any) -> RunningStep | None:
    """Return the outermost running train step of a model, or None."""
    return next((step for step in _RUNNING.get() if step.model is model), None)


def innermost_step() -> RunningStep | None:
    """Return the running train step that contains no other one, or None."""
    return next(reversed(_RUNNING.get()), None)


@contextlib.contextmanager
def enter_step(model: Any, *, of_keras: bool = False) -> Iterator[RunningStep]:
    """Mark the code inside as a train step of a model, or as the part that Keras's step runs."""
    step = RunningStep(model, of_keras=of_keras)
    token = _RUNNING.set((*_RUNNING.get(), step))
    try:
        yield step
    finally:
        _RUNNING.reset(token)
