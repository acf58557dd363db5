"""Models for inference alone: their variables are too coarse to be trained, and they refuse."""

from __future__ import annotations

from typing import Any

from kerasmp.errors import PolicyError


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
