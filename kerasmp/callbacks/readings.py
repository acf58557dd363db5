"""Reads the counters of optimizers that scale the loss: kerasmp's and stock Keras's."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasmp.optimizer import LossScaleOptimizer


@dataclasses.dataclass(frozen=True)
class Reading:
    """The counters at one moment.

    Attributes:
        loss_scale: The current scale.
        applied: Steps applied so far.
        skipped: Steps skipped so far.
        in_a_row: Steps skipped in a row up to now.
        at_floor: Whether the schedule does not let the scale fall further.
        causes: Steps skipped so far for each cause, see `LossScaleOptimizer.skip_causes`; empty
            if the optimizer does not know them.
        accumulated: Steps that wait for the rest of their window; None without accumulation, or
            if the optimizer does not know.
    """

    loss_scale: float
    applied: int
    skipped: int
    in_a_row: int
    at_floor: bool
    causes: dict[str, int] = dataclasses.field(default_factory=dict)
    accumulated: int | None = None


class Source:
    """Reads kerasmp's LossScaleOptimizer, which has all the counters.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def read(self, steps: int) -> Reading:  # noqa: ARG002 - StockSource needs it
        """Return the counters, after `steps` steps of this fit."""
        optimizer = self.optimizer
        scale = optimizer.loss_scale
        return Reading(
            loss_scale=scale,
            applied=optimizer.applied_steps,
            skipped=optimizer.skipped_steps,
            in_a_row=optimizer.consecutive_skips,
            at_floor=scale <= optimizer.schedule.min_scale,
            causes=optimizer.skip_causes,
            accumulated=optimizer.accumulated_steps,
        )

    def gradient_counts(self) -> Any:
        """Return `nonfinite_counts` and `nan_counts` as the rows of an array.

        None if the optimizer does not know them, or is not built.
        """
        optimizer = self.optimizer
        if not optimizer.built:
            return None
        return np.stack([optimizer.nonfinite_counts, optimizer.nan_counts])


class StockSource(Source):
    """Infers the counters of stock Keras's LossScaleOptimizer, which does not count skipped steps.

    Only applied steps advance `iterations`, so the other steps were skipped. Which steps these
    were, and which variable caused it, is not known. The counts start with each fit.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._first = self._iterations()
        self._seen = (0, 0)
        self._in_a_row = 0

    def _iterations(self) -> int:
        # With gradient accumulation, the property `iterations` counts updates instead of steps.
        variables = self.optimizer.inner_optimizer.variables
        iteration = next(variable for variable in variables if variable.name == "iteration")
        return int(ops.convert_to_numpy(iteration))

    def read(self, steps: int) -> Reading:
        """Return the counters, after `steps` steps of this fit."""
        applied = min(self._iterations() - self._first, steps)
        seen_steps, seen_applied = self._seen
        if applied > seen_applied:
            self._in_a_row = 0
        else:
            self._in_a_row += steps - seen_steps
        self._seen = (steps, applied)
        optimizer = self.optimizer
        scale = optimizer.dynamic_scale if optimizer.built else optimizer.initial_scale
        return Reading(
            loss_scale=float(ops.convert_to_numpy(scale)),
            applied=applied,
            skipped=steps - applied,
            in_a_row=self._in_a_row,
            at_floor=False,  # stock Keras has no floor
        )

    def gradient_counts(self) -> Any:
        """Return None, since stock Keras does not count them."""
        return None


def source_of(optimizer: Any) -> Source | None:
    """Return a reader of `optimizer`, or None if it does not scale the loss."""
    if isinstance(optimizer, LossScaleOptimizer):
        return Source(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return StockSource(optimizer)
    return None
