"""What is put around methods of every model class of ours, also those that a user has replaced."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

from kerasmp.backend.keras_internals import RESULT_OR_LOGS, UPDATE_METRICS
from kerasmp.model.float32 import float32_predictions
from kerasmp.model.serialization import adding_extras, taking_up_extras, taking_up_layers
from kerasmp.model.train_step import guarded, losses_noted, numbers_of_batch

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
# What guards refers to itself by it: a wrapper of the user's own may copy it, by functools.wraps.
_MARK = "_kerasmp_guarded"
_METHOD = "_kerasmp_method"  # what a guard on a single model is around

T = TypeVar("T", bound=type)


def guard_late(model: Any, ours: type) -> None:
    """Put guards around methods that were replaced since: in classes, or on this model alone.

    Args:
        model: The model.
        ours: The class of ours that it is of; nothing is put into what it inherits from.
    """
    for cls in reversed(type(model).__mro__):
        if issubclass(cls, ours):
            with_guards(cls)
    for name, guard in _GUARDS.items():
        method = vars(model).get(name)
        # Models are made by their class's `from_config`, never by one on a model.
        if method is not None and name != "from_config" and not _has_guard(method):
            guarding = functools.partial(guard(_with_model(method)), model)
            setattr(guarding, _MARK, guarding)
            setattr(guarding, _METHOD, method)
            # Around Keras's own __setattr__: this is no state.
            object.__setattr__(model, name, guarding)


def take_guards_off(model: Any) -> None:
    """Give a model what was put on it alone as it was, without the guards around it.

    Args:
        model: The model, which is of a stock class again.
    """
    for name in _GUARDS:
        method = vars(model).get(name)
        if _has_guard(method) and hasattr(method, _METHOD):
            object.__setattr__(model, name, getattr(method, _METHOD))


def _with_model(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return what was put on a single model as a method of its class, which is given the model."""

    def of_class(_: Any, *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return of_class


def is_guarded(name: str) -> bool:
    """Return whether methods of this name get a guard."""
    return name in _GUARDS


def with_guards(cls: T) -> T:
    """Put a guard around each method that has none: the class's own, or one of a mixin's."""
    for name, guard in _GUARDS.items():
        method = getattr(cls, name, None)
        if method is not None and not _has_guard(method):
            guarding = guard(method)
            function = getattr(guarding, "__func__", guarding)  # of a class method, too
            setattr(function, _MARK, function)
            setattr(cls, name, guarding)
    return cls


def _has_guard(method: Any) -> bool:
    function = getattr(method, "__func__", method)
    return getattr(function, _MARK, None) is function
