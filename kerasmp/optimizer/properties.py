"""What can be read of a `LossScaleOptimizer`: each function here is a property or method of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from kerasmp.backend.keras_internals import steps_of
from kerasmp.backend.nested import optimizer_chain
from kerasmp.errors import LossScaleError
from kerasmp.optimizer.causes import CAUSES
from kerasmp.optimizer.counters import COUNTERS, skipped_in_all
from kerasmp.optimizer.counters import consecutive_skips as in_a_row
from kerasmp.optimizer.counters import skipped_last as was_skipped
from kerasmp.optimizer.fused import Fused
from kerasmp.optimizer.scaled_losses import note_reading
from kerasmp.optimizer.unscaled_gradients import refuse_jit_constant

if TYPE_CHECKING:
    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer


def _read(optimizer: LossScaleOptimizer, name: str) -> Any:
    """Return the value of an own variable as a NumPy array."""
    variable = getattr(optimizer, name)
    refuse_jit_constant(
        variable.value,
        f"a read of `{name}` as a number",
        "Read it after the step; within a step use the variable, or scale_loss.",
    )
    # Not its `value`, which in the scope of a strategy is one for each replica.
    return ops.convert_to_numpy(variable)


def _counts(optimizer: LossScaleOptimizer) -> Any:
    if optimizer.built:
        return _read(optimizer, "counts_variable")
    return np.zeros(len(COUNTERS), "int64")


def dynamic_scale(optimizer: LossScaleOptimizer) -> Any:
    """The scalar variable that holds the current scale; there is none before `build`."""
    if "scale_variable" not in vars(optimizer):
        raise AttributeError("There is no dynamic_scale before the optimizer is built.")
    note_reading(optimizer, "a read of `dynamic_scale`")
    return optimizer.scale_variable


def keep_dynamic_scale(optimizer: LossScaleOptimizer, variable: Any) -> None:
    """Keep the variable where a step of ours reads it; Keras and TensorFlow have tracked it."""
    object.__setattr__(optimizer, "scale_variable", variable)


def loss_scale(optimizer: LossScaleOptimizer) -> float:
    """The current scale; reading it waits for the device, use `dynamic_scale` in a step.

    Settable, within the schedule's bounds; the schedule then starts anew from there.
    """
    note_reading(optimizer, "a read of `loss_scale`")
    if not optimizer.built:
        return optimizer.schedule.initial_scale
    return float(_read(optimizer, "dynamic_scale"))


def skipped_steps(optimizer: LossScaleOptimizer) -> int:
    """Steps that were skipped because a gradient was not finite."""
    return int(_counts(optimizer)[COUNTERS.index("skipped_steps")])


def applied_steps(optimizer: LossScaleOptimizer) -> int:
    """Steps whose gradients reached the inner optimizer."""
    return int(_counts(optimizer)[COUNTERS.index("applied_steps")])


def consecutive_skips(optimizer: LossScaleOptimizer) -> int:
    """Steps skipped in a row up to now."""
    return int(in_a_row(_counts(optimizer)))


def last_step_skipped(optimizer: LossScaleOptimizer) -> bool:
    """Whether the last step was skipped."""
    return consecutive_skips(optimizer) > 0


def skipped_last(self: LossScaleOptimizer) -> Any:
    """Return `last_step_skipped` as a scalar bool tensor, without waiting for the device.

    Raises:
        LossScaleError: If the optimizer is not built.
    """
    if not self.built:
        raise LossScaleError(
            "The optimizer has no counters yet.",
            received="skipped_last() of an optimizer that is not built",
            expected="a built optimizer",
            fix="Call build(model.trainable_variables) first.",
        )
    return was_skipped(self.counts_variable)


def skips(self: LossScaleOptimizer) -> Any:
    """Return `skipped_steps` as a scalar integer tensor, or None before `build`."""
    return skipped_in_all(self.counts_variable) if self.built else None


def nonfinite_counts(optimizer: LossScaleOptimizer) -> Any:
    """For each trainable variable, in how many steps its gradient was not finite.

    Returns:
        Integer NumPy array, shape `(number of trainable variables,)`; empty before `build`.
    """
    built = optimizer.built
    return _read(optimizer, "nonfinite_counts_variable") if built else np.zeros(0, "int64")


def skip_causes(optimizer: LossScaleOptimizer) -> dict[str, int]:
    """How many steps were skipped for each cause: "loss", "gradients", "floor", "unknown".

    "loss": the loss itself was inf or NaN, no scale helps, and the scale was not lowered.
    "gradients": the loss was finite, gradients were not; the scale was presumed too high.
    "floor": the same where the scale can sink no further. "unknown": `apply` did not see the
    loss (with a stock `keras.Model` on JAX it cannot), and treated it as "gradients".
    """
    counts = _counts(optimizer).tolist()
    return {cause: counts[COUNTERS.index(cause)] for cause in CAUSES}


def optimizers(optimizer: LossScaleOptimizer) -> Any:
    """The optimizers inside a `keras.optimizers.MultiOptimizer`.

    `LearningRateScheduler` and `ReduceLROnPlateau` look for them. With any other inner
    optimizer there is no such attribute.
    """
    return optimizer.inner_optimizer.optimizers


def fused_update(optimizer: LossScaleOptimizer) -> Fused | None:
    """The inner optimizer's update in one kernel for each variable; None where there is none."""
    if not optimizer.fused:
        return None
    return Fused.of(optimizer.inner_optimizer, optimizer.schedule)


def accumulated_steps(optimizer: LossScaleOptimizer) -> int | None:
    """Applied steps that wait in the accumulators until their window is full.

    0 right after an update; None without `gradient_accumulation_steps`. A skipped step does
    not count, so that windows end later after it. In a `MultiOptimizer` whose optimizers have
    windows of different lengths, this is the largest number.
    """
    inside = optimizer_chain(optimizer.inner_optimizer)
    windows = [(o, o.gradient_accumulation_steps) for o in inside]
    return max((steps_of(o) % int(number) for o, number in windows if number), default=None)


def initial_scale(optimizer: LossScaleOptimizer) -> float:
    """The schedule's first scale."""
    note_reading(optimizer, "a read of `initial_scale`")
    return optimizer.schedule.initial_scale


def dynamic_growth_steps(optimizer: LossScaleOptimizer) -> int | None:
    """The schedule's growth interval; None for a scale that does not grow."""
    return getattr(optimizer.schedule, "growth_interval", None)


def own_variables(optimizer: LossScaleOptimizer) -> list[Any]:
    """The variables beside the inner optimizer's; `variables` holds both."""
    return list(optimizer._variables)  # noqa: SLF001 - see keras_internals


def target_variables(optimizer: LossScaleOptimizer) -> list[Any]:
    """The variables that it was built with, in the order of `nonfinite_counts`."""
    return list(optimizer._trainable_variables)  # noqa: SLF001 - see keras_internals
