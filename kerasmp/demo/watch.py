"""What is read while a demo trains, seldom enough not to slow it."""

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

# On JAX a reading waits for the state to come back from the device. Every 16 steps that is lost in
# the noise, every step it is not.
_EVERY = 16


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a demo has come.

    Args:
        recipe: Name of the recipe that trains.
        run: Its number, from 1.
        runs: Number of recipes.
        step: Steps done under it.
        steps: Steps in all under it.
        loss: Mean training loss of the epoch so far; None before the first step.
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
    """Times the steps, follows the scale and reports progress.

    Args:
        report: Called with the steps done and the loss.
        steps: Steps of an epoch.
    """

    def __init__(self, report: Callable[[int, float | None], None], steps: int) -> None:
        super().__init__()
        self._report = report
        self._steps = steps
        self._seconds: list[float] = []
        self._done = 0
        self._skipped = 0
        self.scales: list[ScaleReading] = []

    @property
    def seconds_per_step(self) -> float:
        """The median over the epochs; the first counts only if it is alone. NaN if unknown."""
        if not self._seconds:
            return float("nan")
        return median(self._seconds[1:] or self._seconds)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's
        """Take the first reading."""
        self._read_scale()
        self._report(0, None)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Remember the steps done before this epoch."""
        self._done = epoch * self._steps

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Look at the loss and the scale now and then, and take the time."""
        last = batch == self._steps - 1
        if not (last or batch % _EVERY == 0):
            return
        # Waits for the step, so that the time is that of work done and not of work handed out.
        loss = float((logs or {})["loss"])
        if batch == 0:
            self._start = time.perf_counter()
        elif last:
            self._seconds.append((time.perf_counter() - self._start) / batch)
        self._read_scale(self._done + batch + 1)
        self._report(self._done + batch + 1, loss)

    def _read_scale(self, step: int = 0) -> None:
        optimizer = self.model.optimizer
        if not isinstance(optimizer, LossScaleOptimizer):
            return
        with backend.current().reading(self.model):
            skipped, scale = optimizer.skipped_steps, optimizer.loss_scale
        self.scales.append(ScaleReading(step, scale, skipped - self._skipped))
        self._skipped = skipped
