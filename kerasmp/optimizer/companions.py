"""What users reach through the wrapper although it belongs to the optimizer inside."""

from __future__ import annotations

from typing import Any

from keras import ops

from kerasmp.backend.nested import optimizers_in
from kerasmp.errors import LossScaleError
from kerasmp.optimizer.advancing import include_skips
from kerasmp.optimizer.arguments import INNER_ARGUMENTS


class InnerSettings:
    """The settings of the inner optimizer, as far as the wrapper passes them on or sends there.

    Attributes:
        inner_optimizer: The wrapped optimizer.
    """

    inner_optimizer: Any
    skips_advance_schedules: bool

    def __setattr__(self, name: str, value: Any) -> None:
        # The parent class has these settings too, and no step ever looks at them there.
        if name == "schedule" and getattr(self, "built", False):
            raise LossScaleError(
                "The state and the steps compiled so far belong to the schedule that there is.",
                received=f"optimizer.schedule = {value!r} after build",
                expected="another schedule before build",
                fix="Set optimizer.loss_scale, or make a new optimizer with loss_scale=<schedule>.",
            )
        if name == "loss_scale_factor" and "inner_optimizer" in self.__dict__:
            raise LossScaleError(
                "`loss_scale_factor` is the scale of an optimizer that is not wrapped.",
                received=f"optimizer.loss_scale_factor = {value!r}",
                expected=f"LossScaleOptimizer(inner_optimizer, loss_scale={value!r})",
                fix="On the optimizer inside it would divide every update once more.",
            )
        if name in INNER_ARGUMENTS and "inner_optimizer" in self.__dict__:
            raise LossScaleError(
                f"`{name}` belongs to the optimizer inside.",
                received=f"optimizer.{name} = {value!r}",
                expected=f"optimizer.inner_optimizer.{name} = {value!r}",
                fix="Set it there, before the first step: a compiled step keeps what it found.",
            )
        super().__setattr__(name, value)

    def exclude_from_weight_decay(self, *args: Any, **kwargs: Any) -> None:
        """Leave variables out of the inner optimizer's weight decay; call it before `build`.

        Args:
            *args: As for `keras.optimizers.Optimizer.exclude_from_weight_decay`.
            **kwargs: The same: `var_list`, `var_names`.
        """
        self.inner_optimizer.exclude_from_weight_decay(*args, **kwargs)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate: its variable, or what its schedule gives now.

        Settable, as in Keras: to a number if it is one, or before `build` to a schedule.
        """
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value
        if self.skips_advance_schedules:
            include_skips(self)

    @property
    def optimizers(self) -> Any:
        """The optimizers inside a `keras.optimizers.MultiOptimizer`.

        `LearningRateScheduler` and `ReduceLROnPlateau` look for them. With any other inner
        optimizer there is no such attribute.
        """
        return self.inner_optimizer.optimizers

    @property
    def accumulated_steps(self) -> int | None:
        """Applied steps that wait in the accumulators until their window is full.

        0 right after an update; None without `gradient_accumulation_steps`. A skipped step does
        not count, so that windows end later after it. In a `MultiOptimizer` whose optimizers have
        windows of different lengths, this is the largest number.
        """
        inside = optimizers_in(self.inner_optimizer)
        return max((_accumulated(o) for o in inside if o.gradient_accumulation_steps), default=None)


def _accumulated(optimizer: Any) -> int:
    # Not the property `iterations`, which counts full windows.
    steps = next(variable for variable in optimizer.variables if variable.name == "iteration")
    return int(ops.convert_to_numpy(steps)) % int(optimizer.gradient_accumulation_steps)
