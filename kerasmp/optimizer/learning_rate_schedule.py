"""Learning-rate schedules that count skipped steps too."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from kerasmp.backend.optimizer_internals import learning_rate_schedules
from kerasmp.optimizer.counters import skipped_steps


@keras.saving.register_keras_serializable(package="kerasmp")
class SkipsIncluded(LearningRateSchedule):
    """A learning-rate schedule that advances at skipped steps too.

    `LossScaleOptimizer(skips_advance_schedules=True)` creates it. Only the step that the schedule
    sees changes. Moments, averages and accumulation do not count skipped steps.

    Args:
        schedule: The wrapped schedule.
    """

    def __init__(self, schedule: LearningRateSchedule) -> None:
        self.schedule = schedule
        self._optimizer: Any = None

    def follow(self, optimizer: Any) -> None:
        """Count the skipped steps of `optimizer`, a `LossScaleOptimizer`."""
        self._optimizer = optimizer

    def __call__(self, step: Any) -> Any:
        """Return the learning rate after `step` applied steps and all skipped ones."""
        if self._optimizer is None or not self._optimizer.built:
            return self.schedule(step)
        step = ops.convert_to_tensor(step)
        skipped = skipped_steps(self._optimizer.counts_variable)
        return self.schedule(step + ops.cast(skipped, step.dtype))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {"schedule": keras.saving.serialize_keras_object(self.schedule)}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> SkipsIncluded:
        """Return the schedule that `get_config` described."""
        return cls(
            keras.saving.deserialize_keras_object(config["schedule"], custom_objects=custom_objects)
        )


def include_skips(optimizer: Any) -> None:
    """Make the schedules inside `optimizer`, a `LossScaleOptimizer`, advance at skipped steps."""
    for inside, schedule in learning_rate_schedules(optimizer.inner_optimizer):
        if not isinstance(schedule, SkipsIncluded):
            inside.learning_rate = SkipsIncluded(schedule)
    for _, schedule in learning_rate_schedules(optimizer.inner_optimizer):
        schedule.follow(optimizer)
