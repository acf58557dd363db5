"""What is put around methods of every model class of ours, also those that a user has replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from kerasmp.backend.keras_private import RESULT_OR_LOGS, UPDATE_METRICS
from kerasmp.model.float32 import float32_predictions
from kerasmp.model.saved import adding_extras, taking_up_extras, taking_up_layers
from kerasmp.model.steps import guarded, losses_noted, numbers_of_batch

if TYPE_CHECKING:
    from collections.abc import Callable

_GUARDS: dict[str, Callable[[Any], Any]] = {
    "train_step": guarded,
    "compute_loss": float32_predictions,
    "compute_metrics": float32_predictions,
    UPDATE_METRICS: losses_noted,
    RESULT_OR_LOGS: numbers_of_batch,
    "get_config": adding_extras,
    "from_config": taking_up_extras,
    "build_from_config": taking_up_layers,
}
_MARK = "_kerasmp_guarded"

T = TypeVar("T", bound=type)


def with_guards(cls: T) -> T:
    """Put a guard around each method that has none: the class's own, or one of a mixin's."""
    for name, guard in _GUARDS.items():
        method = getattr(cls, name, None)
        if method is not None and not hasattr(method, _MARK):
            guarding = guard(method)
            setattr(getattr(guarding, "__func__", guarding), _MARK, True)  # of a class method, too
            setattr(cls, name, guarding)
    return cls
