"""Methods of `LossScaleOptimizer` that read the scale, note losses and unscale gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops

from kerasmp import backend
from kerasmp.errors import LossScaleError
from kerasmp.optimizer.properties import refuse_jit_constant
from kerasmp.optimizer.scale_tracking import record_scaling
from kerasmp.optimizer.step import divide_gradient, takes_gradient_as_value
from kerasmp.optimizer.step_arguments import as_gradients, as_list, as_real_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer


def scale_here(self: LossScaleOptimizer, what: str) -> Any:
    """Return the current scale as the code that runs or is traced here must see it.

    Args:
        self: The optimizer.
        what: The method that needs the scale, for the message.
    """
    record_scaling(self, what)
    scale = self.scale_variable.value if self.built else self.schedule.initial_scale
    refuse_jit_constant(
        scale,
        what,
        "Call optimizer.build(model.trainable_variables) before tracing, and scale and unscale "
        "within `keras.StatelessScope(list(zip(optimizer.variables, values)))`.",
    )
    return scale


def note_loss(self: LossScaleOptimizer, loss: Any) -> None:
    """Note the loss for the next `apply`, which then knows the cause if it skips the step.

    `scale_loss` does this, except on JAX, where it runs in the function that is differentiated. On
    JAX, call this outside of that function, before `apply` or `stateless_apply` in the same trace.

    Args:
        self: The optimizer.
        loss: The unscaled loss, of any shape. If several losses are noted, all must be finite.
    """
    loss = as_real_tensor("The loss", loss)
    # The gradient stops here, since torch would otherwise keep the graph of the loss.
    self.pending.losses.add(*backend.current().trace_context(), ops.stop_gradient(loss))


def get_scaled_loss(self: LossScaleOptimizer, loss: Any) -> Any:
    """Return the loss times the scale, as in Keras 2. New code calls `scale_loss`.

    Args:
        self: The optimizer.
        loss: As for `scale_loss`, or a function that returns the loss.

    Returns:
        The scaled loss in float32, or a function that returns it.
    """
    return (lambda: self.scale_loss(loss())) if callable(loss) else self.scale_loss(loss)


@backend.without_autograph
def get_unscaled_gradients(
    self: LossScaleOptimizer, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None
) -> list[Any]:
    """Return the gradients divided by the scale. The next `apply` does not divide them again.

    This is for loops from Keras 2, and for loops that clip or read gradients before they apply
    them. Like PyTorch's `GradScaler.unscale_`, it is called once for each `apply`, in the same
    traced function. An inf or NaN remains, and the step is skipped.

    Args:
        self: The optimizer.
        grads: Gradients of the scaled loss, in the order of the variables. Some may be None.
        trainable_variables: The variables that `grads` belong to. They are only needed if some
            have `overwrite_with_gradient`, whose gradients are not divided, and only before
            `build` or for a part of the variables.

    Returns:
        The gradients in float32. Sparse gradients stay sparse.

    Raises:
        LossScaleError: If it was called before without an `apply` in between, if a gradient has no
            numbers, or if the variables are needed and not known. Also while JAX traces a step,
            outside of a `keras.StatelessScope` that holds `variables`.
        ArgumentTypeError: If an argument is not a list.
    """
    grads = as_gradients(as_list("grads", grads))
    if trainable_variables is not None:
        trainable_variables = as_list("trainable_variables", trainable_variables)
    scale = self.scale_here("get_unscaled_gradients")
    known = self.target_variables if self.built else []
    variables = _variables_of(grads, trainable_variables, known)
    self.pending.unscaled.add(*backend.current().trace_context(), grads)
    return [divide_gradient(g, v, scale) for g, v in zip(grads, variables, strict=True)]


def forget_unscaled(self: LossScaleOptimizer) -> None:
    """Forget unscaled gradients and noted losses of a step that is not applied."""
    self.pending.unscaled.clear()
    self.pending.losses.clear()


def _variables_of(grads: Sequence[Any], given: list[Any] | None, known: list[Any]) -> Sequence[Any]:
    """Return a variable for each gradient, or None if it is not known and makes no difference.

    Args:
        grads: The gradients.
        given: The variables that the caller passed, or None.
        known: The variables that the optimizer was built with.

    Raises:
        LossScaleError: If it is not known and makes a difference.
    """
    variables = known if given is None else given
    if len(variables) == len(grads):
        return variables
    if given is not None or any(takes_gradient_as_value(v) for v in known):
        raise LossScaleError(
            "It is not known which gradients are new values of their variables, which are not "
            "unscaled.",
            received=f"{len(grads)} gradients for {len(variables)} variables",
            expected="one gradient, or None, for each variable",
            fix="Call get_unscaled_gradients(grads, variables).",
        )
    return [None] * len(grads)
