"""The callback that records the scale and the time of a demo, and reports its progress."""

from __future__ import annotations

import dataclasses
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.demo.results import ScaleReading
from kerasmp.optimizer import LossScaleOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable

# On JAX a reading waits for the device. Every 16 steps, the cost is too small to measure.
_EVERY = 16


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a demo.

    Args:
        recipe: The name of the recipe that is training.
        run: Its number, from 1.
        runs: The number of recipes.
        step: The number of steps done with this recipe.
        steps: The total number of steps with this recipe.
        loss: The mean training loss of the epoch so far; None before the first step.
        finished: Whether the run is over.
    """

    recipe: str
    run: int
    runs: int
    step: int
    steps: int
    loss: float | None = None
    finished: bool = False


class Watch(keras.callbacks.Callback):
    """Measures the time of a step, records the loss scale, and reports progress.

    Args:
        report: Called with the progress every few steps, or None.
        start: The progress before the first step.
        steps: The number of steps in an epoch.
    """

    def __init__(
        self, report: Callable[[Progress], None] | None, start: Progress, steps: int
    ) -> None:
        super().__init__()
        self._report = report
        self._start = start
        self._steps = steps
        self._seconds: list[float] = []
        self._first_step = 0
        self._skipped = 0
        self.scales: list[ScaleReading] = []

    @property
    def seconds_per_step(self) -> float:
        """The median over the epochs, without the first if there are more; NaN if unknown."""
        return median(self._seconds[1:] or self._seconds or [float("nan")])

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's
        """Take the first reading."""
        self._read(0)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Remember the number of steps before this epoch."""
        self._first_step = epoch * self._steps

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Take a reading after some steps, and measure the time from the first to the last."""
        last = batch == self._steps - 1
        if not (last or batch % _EVERY == 0):
            return
        # float() waits until the step is done, so the time is right.
        loss = float((logs or {})["loss"])
        if batch == 0:
            self._first_step_end = time.perf_counter()
        elif last:
            self._seconds.append((time.perf_counter() - self._first_step_end) / batch)
        self._read(self._first_step + batch + 1, loss)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Report that the run is over."""
        if self._report is not None:
            loss = (logs or {})["loss"]
            steps = self._start.steps
            self._report(dataclasses.replace(self._start, step=steps, loss=loss, finished=True))

    def _read(self, step: int, loss: float | None = None) -> None:
        optimizer = self.model.optimizer
        if isinstance(optimizer, LossScaleOptimizer):
            with backend.current().current_optimizer_state(self.model):
                skipped, scale = optimizer.skipped_steps, optimizer.loss_scale
            self.scales.append(ScaleReading(step, scale, skipped - self._skipped))
            self._skipped = skipped
        if self._report is not None:
            self._report(dataclasses.replace(self._start, step=step, loss=loss))
