"""What `LossScaleOptimizer` has for loops from Keras 2, which scale and unscale by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kerasmp import backend
from kerasmp.optimizer import arguments
from kerasmp.optimizer.unscaled_gradients import belonging_to, divided, number_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer


def get_scaled_loss(self: LossScaleOptimizer, loss: Any) -> Any:
    """Return the loss times the scale, as in Keras 2; new code calls `scale_loss`.

    Args:
        self: The optimizer.
        loss: As for `scale_loss`, or a function that returns it.

    Returns:
        The scaled loss in float32, or a function that returns it.
    """
    return (lambda: self.scale_loss(loss())) if callable(loss) else self.scale_loss(loss)


@backend.as_written
def get_unscaled_gradients(
    self: LossScaleOptimizer, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None
) -> list[Any]:
    """Return the gradients divided by the scale; the next `apply` leaves that out.

    For loops from Keras 2, and for those that clip or look at gradients before they apply them.
    As PyTorch's `GradScaler.unscale_`, it is called once for each `apply`, in the same traced
    function. An inf or NaN stays one, and the step is skipped.

    Args:
        self: The optimizer.
        grads: Gradients of the scaled loss, None among them or not, in the order of the
            variables.
        trainable_variables: The variables that `grads` belong to. Needed only where some have
            `overwrite_with_gradient`, whose gradients are left as they are: before `build`,
            when nothing tells, and for a part of the variables.

    Returns:
        The gradients in float32, sparse ones still sparse.

    Raises:
        LossScaleError: If it was called before without an `apply` in between, or it cannot
            know the variables where that matters. Also while JAX traces a step, outside a
            `keras.StatelessScope` that holds `variables`; and for what is no gradient.
        ArgumentTypeError: If what is given is no list.
    """
    grads = arguments.gradients(arguments.listed("grads", grads))
    if trainable_variables is not None:
        trainable_variables = arguments.listed("trainable_variables", trainable_variables)
    scale = self.scale_here("get_unscaled_gradients")
    known = self.target_variables if self.built else ()
    variables = belonging_to(grads, trainable_variables, known)
    self.pending.unscaled.set(*backend.current().trace_context(), number_of(grads))
    return [divided(g, v, scale) for g, v in zip(grads, variables, strict=True)]


def forget_unscaled(self: LossScaleOptimizer) -> None:
    """Forget gradients that were unscaled, and losses that were noted, for a step not taken."""
    self.pending.unscaled.clear()
    self.pending.losses.clear()
