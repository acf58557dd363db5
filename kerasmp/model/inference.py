"""Models for inference alone: their variables are too coarse to be trained, and they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kerasmp.errors import PolicyError

if TYPE_CHECKING:
    import contextlib


def only_for_inference(model: Any, undo: contextlib.ExitStack) -> None:
    """Let a model of ours refuse to train, also where it is loaded from a file.

    Its optimizer, whose state would be most of what it takes in memory and in files, goes; it can
    still `evaluate` by the losses and metrics that it was compiled with.

    Args:
        model: A `kerasmp.Model`.
        undo: Is given what puts all back.
    """
    undo.callback(setattr, model, "_for_inference", model._for_inference)  # noqa: SLF001 - ours
    model._for_inference = True  # noqa: SLF001
    let_go_optimizer(model, undo)


def let_go_optimizer(model: Any, undo: contextlib.ExitStack) -> Any:
    """Take the optimizer from a model, stock or ours.

    Args:
        model: The model.
        undo: Is given what puts it back.

    Returns:
        The optimizer; None if there was none.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        undo.callback(_put_back, model, optimizer)
        model.optimizer = None
    return optimizer


def _put_back(model: Any, optimizer: Any) -> None:
    if model.optimizer is None:  # another is what the user has compiled it with since
        model.optimizer = optimizer


def refuse_training(model: Any) -> None:
    """Raise if a model is for inference alone.

    Raises:
        PolicyError: If it is.
    """
    if not model._for_inference:  # noqa: SLF001 - ours
        return
    dtypes = {v.dtype for v in model.trainable_variables} & {"float16", "bfloat16"}
    raise PolicyError(
        "The model was converted for inference alone: steps of training are mostly smaller than "
        "its variables can tell.",
        received=f'training of "{model.name}", with variables in '
        f"{' and '.join(sorted(dtypes)) or 'few bits'}",
        expected="predict, evaluate or a call",
        fix="Call restore() of the report that convert() returned and train, or train the model "
        "that it was converted from under mixed_float16, and convert again.",
    )
