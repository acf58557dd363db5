"""The callback that logs loss scaling, and warns if steps are lost."""

from __future__ import annotations

import collections
import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.keras_graph import graph_of
from kerasmp.backend.keras_internals import (
    enclosing_callback_list,
    flatten_layers,
    float16_layers,
)
from kerasmp.callbacks.bad_layers import count_by_layer, explain, in_every_layer
from kerasmp.callbacks.last_batch import LastBatch, keep_last_batch, stop_keeping
from kerasmp.callbacks.readings import Reading, source_of
from kerasmp.diagnosis.lint import cheap_findings
from kerasmp.errors import (
    LossScaleError,
    LossScaleWarning,
    NotCompiledError,
    PolicyWarning,
    check_bool,
    check_integer,
)
from kerasmp.model import Model
from kerasmp.model.first_batch import look_at_first_batch, look_no_longer
from kerasmp.policy.spec import HALVES
from kerasmp.probe.finding import lines

if TYPE_CHECKING:
    from kerasmp.callbacks.bad_layers import LayerCount
    from kerasmp.diagnosis import Finding


class OverflowMonitor(keras.callbacks.Callback):
    """Logs loss scaling for each epoch, and warns if steps are lost.

    History, CSVLogger, TensorBoard, EarlyStopping and the progress bar see these entries, wherever
    the monitor is in the list of callbacks:

    - `loss_scale`: the scale at the end of the epoch (float).
    - `skipped_steps`: steps skipped in this epoch (int).
    - `total_skipped_steps`: steps skipped since the optimizer was made (int).
    - `overflow_rate`: skipped steps over all steps of this epoch (float, 0 to 1).
    - `skips_loss`, `skips_gradients`, `skips_floor`, `skips_unknown`: the skipped steps of this
      epoch by cause (int), see `LossScaleOptimizer.skip_causes`.
    - `accumulated_steps`: the steps that wait at the end of the epoch for the rest of their window
      (int), only if gradients are accumulated. Each skipped step shifts the windows by one.

    When training begins, the monitor also warns about the errors and warnings that `kerasmp.lint`
    finds without data. Before the first step it probes the first batch, as `kerasmp.Model.fit` does
    with any model of its own, and warns of what that shows.

    It reads the device at the end of each epoch and every `check_every` batches, not at every step.

    Args:
        check_every: Batches between two readings, default 50.
        streak: Steps skipped in a row before the first warning, default 10. A dynamic scale that
            starts high usually skips a few steps until it has come down.
        stalled: Steps skipped in a row before training counts as stalled, default 50. With the
            scale at its floor, `streak` steps are enough.
        probe: Whether to run the first batch forward twice before the first step, in float32 and
            under the model's policy, and to warn of layers whose values differ by more than
            rounding explains. It happens once for a model, and takes as long as two to four
            predictions of that batch, run eagerly. Default True. With a `kerasmp.Model`, the
            argument `probe` of `fit` decides.
        keep_batch: Whether to keep the batch of the first skipped step of a series, in `bad_batch`.
            The monitor then reads the device at every step. Default False.

    Attributes:
        bad_batch: With `keep_batch`, the batch of the first skipped step of the last series: a dict
            of `x`, `y` and `sample_weight` for `kerasmp.diagnose(model, **monitor.bad_batch)`.
            None before that, and if batches are spread over replicas. With `steps_per_execution`,
            it is the first batch of that execution.

    Raises:
        LossScaleError: If an argument is less than 1, or `streak` is larger than `stalled`.
        ArgumentTypeError: If `probe` or `keep_batch` is not a bool, or another argument is not an
            integer.
        NotCompiledError: When training begins, if the model has no optimizer.

    The monitor also works with stock Keras's LossScaleOptimizer, but knows less: it infers skipped
    steps from `iterations`, counts their total from the start of this `fit`, and names no layer.
    (If `steps_per_execution` does not divide a number of batches that Keras does not know, the
    missing batches of the last execution count as skipped.) Without a loss-scale optimizer it
    writes nothing, and warns if a layer computes in float16.

    Example:

    >>> import numpy as np
    >>> from kerasmp.optimizer import LossScaleOptimizer
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(LossScaleOptimizer("sgd", loss_scale=1024), "mse")
    >>> x = np.ones((8, 4), "float32")
    >>> history = model.fit(x, x[:, :1], verbose=0, callbacks=[OverflowMonitor()])
    >>> history.history["loss_scale"], history.history["skipped_steps"]
    ([1024.0], [0])
    """

    # Lets Keras run `on_train_batch_end` in another thread, as for its progress bar.
    async_safe = True

    def __init__(
        self,
        check_every: int = 50,
        *,
        streak: int = 10,
        stalled: int = 50,
        probe: bool = True,
        keep_batch: bool = False,
    ) -> None:
        super().__init__()
        check_bool("probe", probe)
        check_bool("keep_batch", keep_batch)
        self.probe = probe
        self.keep_batch = keep_batch
        self.bad_batch: dict[str, Any] | None = None
        self._last_batch: LastBatch | None = None
        self.check_every = check_integer("check_every", check_every, LossScaleError)
        self.streak = check_integer("streak", streak, LossScaleError)
        self.stalled = check_integer("stalled", stalled, LossScaleError)
        if self.streak > self.stalled:
            raise LossScaleError(
                "The warning about a stall would come before the one about a streak.",
                received=f"streak={streak!r}, stalled={stalled!r}",
                expected="streak <= stalled",
                fix="Lower `streak`, or raise `stalled`.",
            )
        self._source: Any = None
        self._model_without_sync: Any = None
        self._reported: set[Finding] = set()
        self._epoch_first_step, self._next_check = 0, self.check_every
        # The last batches that ended, in any order: Keras calls from a few dozen threads.
        self._ends: collections.deque[int] = collections.deque(maxlen=256)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's
        """Find the optimizer, and move this callback to the front of the list.

        All callbacks get the same `logs`, and those in front would not see the entries.
        """
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            raise NotCompiledError(
                "OverflowMonitor needs a model with an optimizer.",
                received="no model"
                if self.model is None
                else f'model "{self.model.name}" without an optimizer',
                expected="a compiled model",
                fix="Call model.compile(optimizer=kerasmp.LossScaleOptimizer(...), ...) first.",
            )
        self._source = source_of(optimizer)
        # On JAX, each use of Keras's property `model` writes the present state to all variables.
        self._model_without_sync = self.model
        self._warned: set[str] = set()
        self._steps = 0
        callbacks = enclosing_callback_list()
        if callbacks is not None and any(c is self for c in callbacks.callbacks):
            callbacks.callbacks = [self, *(c for c in callbacks.callbacks if c is not self)]
        if self._source is None:
            self._warn_if_unscaled()
        else:
            self._start_epoch(self._source.read(0))
        self._warn_of_findings()
        if self.probe and not isinstance(self.model, Model):
            look_at_first_batch(self._model_without_sync)
        if self.keep_batch and self._source is not None:
            self._last_batch = keep_last_batch(self._model_without_sync)
            self._last_reading = self._epoch_start

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Leave the train function as Keras made it."""
        stop_keeping(self._model_without_sync)
        look_no_longer(self._model_without_sync)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Start counting this epoch's steps."""
        self._epoch_first_step = self._steps
        self._ends.clear()
        self._next_check = self.check_every

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Read the device every `check_every` batches.

        The end of a batch would be too late, since Keras may report it later, in another thread.
        """
        self._steps = self._epoch_first_step + batch
        if self._last_batch is not None and batch:
            with backend.current().current_optimizer_state(self._model_without_sync):
                self._keep_if_bad(self._source.read(self._steps))
        if self._source is not None and batch >= self._next_check:
            self._next_check = batch + self.check_every
            with backend.current().current_optimizer_state(self._model_without_sync):
                self._warn_if_losing_steps(self._source.read(self._steps))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Remember the batch. If data has an unknown length, Keras begins one batch too many."""
        self._ends.append(batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Add the entries to `logs`, and warn if steps are lost."""
        if self._source is None:
            return
        self._steps = self._steps_at_epoch_end()
        now, start = self._source.read(self._steps), self._epoch_start
        self._keep_if_bad(now)
        skipped = now.skipped - start.skipped
        steps = skipped + now.applied - start.applied
        if logs is not None:
            logs["loss_scale"] = now.loss_scale
            logs["skipped_steps"] = skipped
            logs["total_skipped_steps"] = now.skipped
            logs["overflow_rate"] = skipped / steps if steps else 0.0
            for cause, count in now.causes.items():
                logs[f"skips_{cause}"] = count - start.causes[cause]
            if now.accumulated is not None:
                logs["accumulated_steps"] = now.accumulated
        self._warn_if_losing_steps(now)
        self._start_epoch(now)

    def _start_epoch(self, now: Reading) -> None:
        self._epoch_start, self._gradients_start = now, self._source.gradient_counts()

    def _steps_at_epoch_end(self) -> int:
        ended = max(self._ends, default=-1) + 1
        # If an execution runs several steps, the data may have ended before the last of them.
        known = (self.params or {}).get("steps")
        return self._epoch_first_step + (ended if known is None else min(ended, known))

    def _keep_if_bad(self, now: Reading) -> None:
        """Keep the last batch if its step was the first one of a series to be skipped."""
        if self._last_batch is None:
            return
        before, self._last_reading = self._last_reading, now
        skipped = now.skipped - before.skipped
        # One execution may run several steps, and end after a series that began in it.
        if skipped and (before.in_a_row == 0 or 0 < now.in_a_row <= skipped):
            self.bad_batch = self._last_batch.arguments()

    def _warn_if_losing_steps(self, now: Reading) -> None:
        if now.in_a_row < self.streak:
            return
        kind = "stalled" if now.in_a_row >= self.stalled or now.at_floor else "streak"
        if kind in self._warned:
            return
        before = self._epoch_start.causes
        by_loss, unknown = (
            now.causes.get(cause, 0) - before.get(cause, 0) for cause in ("loss", "unknown")
        )
        counts = self._layer_counts()
        # A loss that is not known is suspect too if no layer is without inf or NaN.
        suspected = by_loss or (unknown and in_every_layer(counts))
        suspect = _loss_on_float16(self._model_without_sync) if suspected else ""
        has_graph = graph_of(self._model_without_sync) is not None
        batch = "x, y" if self.bad_batch is None else "**monitor.bad_batch"
        where = [
            *explain(counts, in_order=has_graph, by_loss=by_loss > 0),
            f"kerasmp.diagnose(model, {batch}) names the operation and the cause.",
        ]
        self._warn_once(kind, _skips_message(kind, now, where, by_loss, suspect))

    def _layer_counts(self) -> list[LayerCount]:
        """Return the counts of this epoch for each layer; none if the optimizer has none."""
        counts, before = self._source.gradient_counts(), self._gradients_start
        if counts is None:
            return []
        if before is not None:  # else the optimizer was built after the epoch had begun
            counts = counts - before
        variables = self._source.optimizer.target_variables
        return count_by_layer(self._model_without_sync, variables, *counts)

    def _warn_if_unscaled(self) -> None:
        float16 = [layer.name for layer in float16_layers(self.model)]
        if float16:
            self._warn_once(
                "unscaled",
                f"Layers compute in float16 ({_few(float16)}) and nothing scales the loss: "
                "gradients below 6e-8 become 0, and an overflow destroys the weights. "
                "Compile with kerasmp.LossScaleOptimizer(optimizer), or build a kerasmp.Model.",
            )

    def _warn_of_findings(self) -> None:
        """Warn of what `kerasmp.lint` finds without data. Each finding is reported only once."""
        if not any(layer.compute_dtype in HALVES for layer in flatten_layers(self.model)):
            return
        found = [each for each in cheap_findings(self.model) if each.severity != "hint"]
        new = [each for each in dict.fromkeys(found) if each not in self._reported]
        self._reported.update(new)
        if new:
            text = "\n".join(lines(new))
            warnings.warn(
                f"Before the first step (for more, call kerasmp.lint):\n{text}",
                PolicyWarning,
                stacklevel=2,
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, LossScaleWarning, stacklevel=2)


def _loss_on_float16(model: Any) -> str:
    """Return the names of a model's losses if it has float16 outputs, else nothing."""
    graph = graph_of(model)
    half = graph is None or any(tensor.dtype == "float16" for tensor in graph.outputs)
    if not half or not float16_layers(model) or getattr(model, "_output_dtype", "") == "float32":
        return ""
    losses = [each for each in keras.tree.flatten(model.loss) if each is not None]
    names = [
        each if isinstance(each, str) else getattr(each, "__name__", None) or type(each).__name__
        for each in losses
    ]
    return _few([f'"{name}"' for name in dict.fromkeys(names)])


def _skips_message(kind: str, now: Reading, where: list[str], by_loss: int, suspect: str) -> str:
    at_floor = ", and its schedule does not let it fall further" if now.at_floor else ""
    stalled = kind == "stalled"
    parts = [
        f"Training has stalled: the last {now.in_a_row} steps were skipped and no weight has "
        f"changed; the loss scale is {now.loss_scale:g}{at_floor}."
        if stalled
        else f"The last {now.in_a_row} training steps were skipped, because gradients were inf or "
        f"NaN; the loss scale is now {now.loss_scale:g}."
    ]
    parts += where
    if by_loss:
        parts.append(
            f"In {by_loss} steps of this epoch the loss itself was inf or NaN: no scale helps then."
        )
    if suspect:
        parts.append(
            f"The loss {suspect} may overflow on float16 outputs, which end at 65504: compute both "
            "in float32, with a float32 head or output=float32. If it is your own, cast y_pred."
        )
    # Gradients overflowed float16 at a scale that does not make them larger.
    if by_loss < now.in_a_row and (now.at_floor or now.loss_scale <= 1):
        parts.append(
            "If the loss is a sum over the batch, or sample weights are large, gradients are large "
            "too: take means."
        )
        if now.at_floor:
            parts.append("Or give the schedule a lower min_scale.")
    if suspect and not stalled:
        parts.append("If that does not help, look for inf and NaN in the data.")
        return " ".join(parts)
    if by_loss >= now.in_a_row and not stalled:
        parts.append("Look for inf and NaN in the data, and for an overflow in the forward pass.")
        return " ".join(parts)
    parts.append(
        "Check the inputs and labels for inf and NaN, lower the learning rate and a fixed loss "
        'scale, and run the layers that overflow in float32, with dtype="float32" or '
        "kerasmp.layers.WithDtype."
        if stalled
        else "A dynamic scale that starts too high comes down in a few steps; in that case lower "
        "its initial_scale. A fixed scale does not come down: lower it yourself. Otherwise look "
        "for inf and NaN in the data."
    )
    return " ".join(parts)


def _few(names: list[str]) -> str:
    return ", ".join([*names[:3], "..."] if names[3:] else names)
