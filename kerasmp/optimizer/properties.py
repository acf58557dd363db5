"""The readable properties of `LossScaleOptimizer`, and the methods that read its counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from kerasmp import backend
from kerasmp.backend.nested import optimizer_chain
from kerasmp.backend.optimizer_internals import step_count
from kerasmp.errors import LossScaleError
from kerasmp.optimizer import counters
from kerasmp.optimizer.counters import CAUSES, COUNTERS
from kerasmp.optimizer.fused import Fused
from kerasmp.optimizer.scale_tracking import record_read
from kerasmp.optimizer.step_arguments import not_built

if TYPE_CHECKING:
    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer


def refuse_jit_constant(value: Any, what: str, fix: str) -> None:
    """Raise if a function that JAX traces here would use `value` in all its calls.

    Args:
        value: A value of the optimizer's state.
        what: What reads it, for the message.
        fix: The fix, for the message.

    Raises:
        LossScaleError: If the traced function does not get `value` as an argument.
    """
    if backend.current().is_jit_constant(value):
        raise LossScaleError(
            "The traced function would use the value of its first call in all its calls.",
            received=f"{what} in a traced function, where the optimizer's state is a constant",
            expected="a scale that is part of the step's state",
            fix=fix,
        )


def _read(optimizer: LossScaleOptimizer, name: str) -> Any:
    """Return the value of a variable of the optimizer as a NumPy array."""
    variable = getattr(optimizer, name)
    refuse_jit_constant(
        variable.value,
        f"a read of `{name}` as a number",
        "Read it after the step. Within a step, use the variable or scale_loss.",
    )
    # Not its `value`, of which there is one for each replica in the scope of a strategy.
    return ops.convert_to_numpy(variable)


def _counts(optimizer: LossScaleOptimizer) -> Any:
    if optimizer.built:
        return _read(optimizer, "counts_variable")
    return np.zeros(len(COUNTERS), "int64")


def dynamic_scale(optimizer: LossScaleOptimizer) -> Any:
    """The scalar variable that holds the current scale. It does not exist before `build`."""
    if "scale_variable" not in vars(optimizer):
        raise AttributeError("There is no dynamic_scale before the optimizer is built.")
    record_read(optimizer, "a read of `dynamic_scale`")
    return optimizer.scale_variable


def set_dynamic_scale(optimizer: LossScaleOptimizer, variable: Any) -> None:
    """Keep the variable as `scale_variable`, which can be read without recording the read.

    Keras and TensorFlow have tracked it under the name `dynamic_scale` before.
    """
    object.__setattr__(optimizer, "scale_variable", variable)


def loss_scale(optimizer: LossScaleOptimizer) -> float:
    """The current scale. Reading it waits for the device; in a step, use `dynamic_scale`.

    You can set it within the bounds of the schedule, which then restarts at this scale.
    """
    record_read(optimizer, "a read of `loss_scale`")
    if not optimizer.built:
        return optimizer.schedule.initial_scale
    return float(_read(optimizer, "dynamic_scale"))


def skipped_steps(optimizer: LossScaleOptimizer) -> int:
    """The number of steps that were skipped because a gradient was not finite."""
    return int(_counts(optimizer)[COUNTERS.index("skipped_steps")])


def applied_steps(optimizer: LossScaleOptimizer) -> int:
    """The number of steps whose gradients the inner optimizer has applied."""
    return int(_counts(optimizer)[COUNTERS.index("applied_steps")])


def consecutive_skips(optimizer: LossScaleOptimizer) -> int:
    """The number of steps in a row that were skipped, up to the last step."""
    return int(counters.consecutive_skips(_counts(optimizer)))


def last_step_skipped(optimizer: LossScaleOptimizer) -> bool:
    """Whether the last step was skipped."""
    return consecutive_skips(optimizer) > 0


def skipped_last(self: LossScaleOptimizer) -> Any:
    """Return `last_step_skipped` as a scalar bool tensor, without waiting for the device.

    Raises:
        LossScaleError: If the optimizer is not built.
    """
    if not self.built:
        raise not_built("skipped_last")
    return counters.last_step_skipped(self.counts_variable)


def skips(self: LossScaleOptimizer) -> Any:
    """Return `skipped_steps` as a scalar integer tensor, or None before `build`."""
    return counters.skipped_steps(self.counts_variable) if self.built else None


def nonfinite_counts(optimizer: LossScaleOptimizer) -> Any:
    """For each trainable variable, the number of steps in which its gradient was not finite.

    A count stops at 65535.

    Returns:
        Integer NumPy array of shape `(number of trainable variables,)`, empty before `build`.
    """
    return _nonfinite_and_nan(optimizer)[0]


def nan_counts(optimizer: LossScaleOptimizer) -> Any:
    """For each trainable variable, the number of steps in which its gradient had a NaN.

    These steps are among those of `nonfinite_counts`. In the others, the gradient had an inf and no
    NaN, or it was too large for float16 or for the norm that clips it. A count stops at 32767.

    Returns:
        Integer NumPy array of shape `(number of trainable variables,)`, empty before `build`.
    """
    return _nonfinite_and_nan(optimizer)[1]


def _nonfinite_and_nan(optimizer: LossScaleOptimizer) -> tuple[Any, Any]:
    built = optimizer.built
    numbers = _read(optimizer, "nonfinite_counts_variable") if built else np.zeros(0, "int64")
    return counters.split_nonfinite(numbers)


def skip_causes(optimizer: LossScaleOptimizer) -> dict[str, int]:
    """The number of skipped steps for each cause: "loss", "gradients", "floor", "unknown".

    "loss": the loss itself was inf or NaN. No scale helps, so the scale was not lowered.
    "gradients": the loss was finite and a gradient was not. The scale was presumed too high.
    "floor": the same, but the scale cannot fall further. "unknown": `apply` did not see the loss
    (it cannot with a stock `keras.Model` on JAX), and treated the step like "gradients".
    """
    counts = _counts(optimizer).tolist()
    return {cause: counts[COUNTERS.index(cause)] for cause in CAUSES}


def optimizers(optimizer: LossScaleOptimizer) -> Any:
    """The optimizers inside a `keras.optimizers.MultiOptimizer`.

    `LearningRateScheduler` and `ReduceLROnPlateau` look for them. With any other inner optimizer,
    this attribute does not exist.
    """
    return optimizer.inner_optimizer.optimizers


def fused_update(optimizer: LossScaleOptimizer) -> Fused | None:
    """The inner optimizer's update in one kernel for each variable, or None if it has none."""
    if not optimizer.fused:
        return None
    return Fused.of(optimizer.inner_optimizer, optimizer.schedule)


def accumulated_steps(optimizer: LossScaleOptimizer) -> int | None:
    """The number of applied steps whose gradients wait in the accumulators.

    It is 0 right after an update, and None without `gradient_accumulation_steps`. A skipped step
    does not count, so the window ends a step later. In a `MultiOptimizer` whose optimizers have
    windows of different lengths, this is the largest number.
    """
    inside = optimizer_chain(optimizer.inner_optimizer)
    windows = [(o, o.gradient_accumulation_steps) for o in inside]
    return max((step_count(o) % int(number) for o, number in windows if number), default=None)


def initial_scale(optimizer: LossScaleOptimizer) -> float:
    """The first scale of the schedule."""
    record_read(optimizer, "a read of `initial_scale`")
    return optimizer.schedule.initial_scale


def dynamic_growth_steps(optimizer: LossScaleOptimizer) -> int | None:
    """The growth interval of the schedule, or None if the scale does not grow."""
    return getattr(optimizer.schedule, "growth_interval", None)


def own_variables(optimizer: LossScaleOptimizer) -> list[Any]:
    """The variables without those of the inner optimizer. `variables` contains both."""
    return list(optimizer._variables)  # noqa: SLF001 - see optimizer_internals


def target_variables(optimizer: LossScaleOptimizer) -> list[Any]:
    """The variables that it was built with, in the order of `nonfinite_counts`."""
    return list(optimizer._trainable_variables)  # noqa: SLF001 - see optimizer_internals
