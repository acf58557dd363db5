"""Wraps methods of every kerasmp model class, those that users override included."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

from kerasmp.backend.keras_internals import RESULT_OR_LOGS, UPDATE_METRICS
from kerasmp.model.float32 import float32_predictions
from kerasmp.model.serialization import add_extras, read_extras, restore_late_layers
from kerasmp.model.train_step import batch_results, note_losses, undo_skipped_steps

if TYPE_CHECKING:
    from collections.abc import Callable

_GUARDS: dict[str, Callable[[Any], Any]] = {
    "train_step": undo_skipped_steps,
    "compute_loss": float32_predictions,
    "compute_metrics": float32_predictions,
    UPDATE_METRICS: note_losses,
    RESULT_OR_LOGS: batch_results,
    "get_config": add_extras,
    "from_config": read_extras,
    "build_from_config": restore_late_layers,
}
# A guard refers to itself by this: functools.wraps may copy it to a wrapper of the user's.
_MARK = "_kerasmp_guarded"
_METHOD = "_kerasmp_method"  # the method that the guard on a single model wraps

T = TypeVar("T", bound=type)


def is_guarded(name: str) -> bool:
    """Return whether methods of this name are guarded."""
    return name in _GUARDS


def with_guards(cls: T) -> T:
    """Guard each method of a class that has no guard: its own, or that of a mixin."""
    for name, guard in _GUARDS.items():
        method = getattr(cls, name, None)
        if method is not None and not _has_guard(method):
            guarded = guard(method)
            function = getattr(guarded, "__func__", guarded)  # of a class method too
            setattr(function, _MARK, function)
            setattr(cls, name, guarded)
    return cls


def guard_replaced(model: Any, kerasmp_class: type) -> None:
    """Guard methods that were replaced after the class was made: on classes, or on this model.

    Args:
        model: The model.
        kerasmp_class: The class that the model inherits from. Its bases are left alone.
    """
    for cls in reversed(type(model).__mro__):
        if issubclass(cls, kerasmp_class):
            with_guards(cls)
    for name, guard in _GUARDS.items():
        method = vars(model).get(name)
        # Keras calls `from_config` of the class, never that of a model.
        if method is not None and name != "from_config" and not _has_guard(method):
            guarded = functools.partial(guard(_as_method(method)), model)
            setattr(guarded, _MARK, guarded)
            setattr(guarded, _METHOD, method)
            # Bypasses Keras's __setattr__, which tracks state: this is none.
            object.__setattr__(model, name, guarded)


def remove_guards(model: Any) -> None:
    """Put the methods that were replaced on a single model back, without their guards.

    Args:
        model: The model, which is of a stock class again.
    """
    for name in _GUARDS:
        method = vars(model).get(name)
        if _has_guard(method) and hasattr(method, _METHOD):
            object.__setattr__(model, name, getattr(method, _METHOD))


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that was put on a single model as a method, which takes the model too."""

    def method(_: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def _has_guard(method: Any) -> bool:
    function = getattr(method, "__func__", method)
    return getattr(function, _MARK, None) is function
