"""Learning-rate schedules for which skipped steps count."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from kerasmp.backend.keras_internals import learning_rate_schedules
from kerasmp.optimizer.counters import skipped_in_all


@keras.saving.register_keras_serializable(package="kerasmp")
class SkipsIncluded(LearningRateSchedule):
    """A learning-rate schedule as seen by an optimizer that may skip steps.

    Made by `LossScaleOptimizer(skips_advance_schedules=True)`; nobody else needs it. Only the step
    that the schedule sees is moved: moments, averages and accumulation count as they did.

    Args:
        schedule: The schedule itself.
    """

    def __init__(self, schedule: LearningRateSchedule) -> None:
        self.schedule = schedule
        self._optimizer: Any = None

    def follow(self, optimizer: Any) -> None:
        """Count the skipped steps of `optimizer`, a `LossScaleOptimizer`."""
        self._optimizer = optimizer

    def __call__(self, step: Any) -> Any:
        """Return the learning rate after `step` applied steps and those that were skipped."""
        if self._optimizer is None or not self._optimizer.built:
            return self.schedule(step)
        step = ops.convert_to_tensor(step)
        skipped = skipped_in_all(self._optimizer.counts_variable)
        return self.schedule(step + ops.cast(skipped, step.dtype))

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, serialised."""
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
    """Let the schedules inside of `optimizer`, a `LossScaleOptimizer`, advance at skipped steps."""
    for inside, schedule in learning_rate_schedules(optimizer.inner_optimizer):
        if not isinstance(schedule, SkipsIncluded):
            inside.learning_rate = SkipsIncluded(schedule)
    for _, schedule in learning_rate_schedules(optimizer.inner_optimizer):
        schedule.follow(optimizer)
