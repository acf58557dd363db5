"""The callback that makes loss scaling visible and speaks up when it goes wrong."""

from __future__ import annotations

import collections
import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.keras_private import enclosing_callback_list, float16_layers
from kerasmp.callbacks.readings import Reading, source_of
from kerasmp.diagnosis.lint import cheap_findings
from kerasmp.errors import (
    LossScaleError,
    LossScaleWarning,
    NotCompiledError,
    PolicyWarning,
    checked_integer,
)

if TYPE_CHECKING:
    from kerasmp.diagnosis import Finding


class OverflowMonitor(keras.callbacks.Callback):
    """Writes what loss scaling did to the epoch's logs, and warns when steps are being lost.

    History, CSVLogger, TensorBoard, EarlyStopping and the progress bar see these entries,
    wherever the monitor stands in the list of callbacks:

    - `loss_scale`: the scale at the end of the epoch (float).
    - `skipped_steps`: steps skipped in this epoch (int).
    - `total_skipped_steps`: steps skipped since the optimizer was made (int).
    - `overflow_rate`: skipped steps over all steps of this epoch (float, 0 to 1).
    - `skips_loss`, `skips_gradients`, `skips_floor`, `skips_unknown`: the skipped steps of this
      epoch by cause (int), see `LossScaleOptimizer.skip_causes`.
    - `accumulated_steps`: only where gradients are accumulated, the steps that wait at the end of
      the epoch for the rest of their window (int); each skipped step shifts the windows by one.

    When training begins, it also warns of the errors and warnings that `kerasmp.lint` finds without
    data and without tracing the model.

    The device is read at epoch ends and every `check_every` batches, never each step.

    Args:
        check_every: Batches between two readings, default 50.
        streak: Steps skipped in a row that earn the first warning, default 10. A dynamic scale
            that starts high may well skip a few steps until it has come down.
        stalled: Steps skipped in a row after which training counts as stalled, default 50; a
            scale at its floor with a streak counts too.

    Raises:
        LossScaleError: For an argument that is less than 1, or a streak above `stalled`.
        ArgumentTypeError: For an argument that is no integer.
        NotCompiledError: When training begins on a model without an optimizer.

    Works with stock Keras's LossScaleOptimizer, with less to tell: skipped steps are inferred from
    `iterations`, their total counts from the start of this `fit`, and no variable can be named.
    (Where `steps_per_execution` does not divide a number of batches that Keras does not know, the
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

    # Keras: its end-of-batch hook may run in a thread of its own, as the progress bar's does.
    async_safe = True

    def __init__(self, check_every: int = 50, *, streak: int = 10, stalled: int = 50) -> None:
        super().__init__()
        self.check_every = checked_integer("check_every", check_every, LossScaleError)
        self.streak = checked_integer("streak", streak, LossScaleError)
        self.stalled = checked_integer("stalled", stalled, LossScaleError)
        if self.streak > self.stalled:
            raise LossScaleError(
                "A streak is what comes before a stall, and would never be told.",
                received=f"streak={streak!r}, stalled={stalled!r}",
                expected="streak <= stalled",
                fix="Lower streak, or raise stalled.",
            )
        self._source: Any = None
        self._watched: Any = None
        self._told: set[Finding] = set()
        self._epoch_first_step, self._next_check = 0, self.check_every
        # The last batches that ended, in any order: Keras may have a few dozen threads tell us.
        self._ends: collections.deque[int] = collections.deque(maxlen=256)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's
        """Find the optimizer to watch, and come first among the callbacks."""
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            raise NotCompiledError(
                "OverflowMonitor has nothing to watch.",
                received="no model"
                if self.model is None
                else f'model "{self.model.name}" without an optimizer',
                expected="a compiled model",
                fix="Call model.compile(optimizer=kerasmp.LossScaleOptimizer(...), ...) first.",
            )
        self._source = source_of(optimizer)
        # Keras's property makes all variables current on JAX each time it is asked for the model.
        self._watched = self.model
        self._warned: set[str] = set()
        self._steps = 0
        callbacks = enclosing_callback_list()
        if callbacks is not None and any(c is self for c in callbacks.callbacks):
            callbacks.callbacks = [self, *(c for c in callbacks.callbacks if c is not self)]
        if self._source is None:
            self._warn_if_unscaled()
        else:
            self._epoch_start = self._source.read(0)
        self._tell_findings()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Start counting this epoch's steps."""
        self._epoch_first_step = self._steps
        self._ends.clear()
        self._next_check = self.check_every

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Look at the device every `check_every` batches.

        At the begin of a batch and not at its end, which may come later, in another thread.
        """
        self._steps = self._epoch_first_step + batch
        if self._source is not None and batch >= self._next_check:
            self._next_check = batch + self.check_every
            with backend.current().reading(self._watched):
                self._warn_if_losing_steps(self._source.read(self._steps))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Remember that the batch came; where data ends unannounced, one begins that never does."""
        self._ends.append(batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Write the entries into `logs`, and look once more."""
        if self._source is None:
            return
        self._steps = self._steps_at_epoch_end()
        now, start = self._source.read(self._steps), self._epoch_start
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
        self._epoch_start = now

    def _steps_at_epoch_end(self) -> int:
        ended = max(self._ends, default=-1) + 1
        # The last execution of several steps may have been cut short by the data's end.
        known = (self.params or {}).get("steps")
        return self._epoch_first_step + (ended if known is None else min(ended, known))

    def _warn_if_losing_steps(self, now: Reading) -> None:
        by_loss = now.causes.get("loss", 0) - self._epoch_start.causes.get("loss", 0)
        if now.in_a_row >= self.stalled or (now.in_a_row >= self.streak and now.at_floor):
            self._warn_once("stalled", _stalled_message(now, self._source.culprits(), by_loss))
        elif now.in_a_row >= self.streak:
            self._warn_once("streak", _streak_message(now, self._source.culprits(), by_loss))

    def _warn_if_unscaled(self) -> None:
        float16 = [layer.name for layer in float16_layers(self.model)]
        if float16:
            self._warn_once(
                "unscaled",
                f"{len(float16)} layers compute in float16 ({_few(float16)}) and nothing scales "
                "the loss: gradients below 6e-8 become 0, and an overflow destroys the weights. "
                "Compile with kerasmp.LossScaleOptimizer(optimizer), or build a kerasmp.Model.",
            )

    def _tell_findings(self) -> None:
        """Warn of what `kerasmp.lint` finds without data; of each finding once, in any `fit`."""
        if not float16_layers(self.model):
            return
        found = [each for each in cheap_findings(self.model) if each.severity != "hint"]
        new = [each for each in dict.fromkeys(found) if each not in self._told]
        self._told.update(new)
        if new:
            lines = "\n".join(map(str, new))
            warnings.warn(
                f"Before the first step (kerasmp.lint tells more):\n{lines}",
                PolicyWarning,
                stacklevel=2,
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, LossScaleWarning, stacklevel=2)


def _streak_message(now: Reading, culprits: list[str], by_loss: int) -> str:
    return (
        f"The last {now.in_a_row} training steps were skipped, since gradients were inf or NaN; "
        f"the loss scale is now {now.loss_scale:g}.{_through(culprits)}"
        f"{_by_loss(by_loss)} A dynamic scale that starts too high comes down in a few steps: if "
        "so, lower its initial_scale. A fixed scale must be lowered by hand. Otherwise look for "
        f"inf or NaN in this data.{_sums(now, by_loss)}"
    )


def _stalled_message(now: Reading, culprits: list[str], by_loss: int) -> str:
    where = ", and its schedule lets it sink no further" if now.at_floor else ""
    return (
        f"Training has stalled: the last {now.in_a_row} steps were skipped and no weight has "
        f"changed; the loss scale is {now.loss_scale:g}{where}.{_through(culprits)}"
        f"{_by_loss(by_loss)}{_sums(now, by_loss)} Check the inputs and labels for "
        "inf and NaN, lower the learning rate, and run the layers that overflow in float32, with "
        'dtype="float32" or kerasmp.layers.WithDtype.'
    )


def _through(culprits: list[str]) -> str:
    return f" Most often not finite: the gradients of {_few(culprits)}." if culprits else ""


def _by_loss(count: int) -> str:
    if not count:
        return ""
    return f" In {count} of this epoch's steps the loss itself was inf or NaN: no scale helps."


def _sums(now: Reading, by_loss: int) -> str:
    """Return what helps where gradients are beyond float16 at a scale that makes nothing larger."""
    if by_loss >= now.in_a_row or not (now.at_floor or now.loss_scale <= 1):
        return ""
    lower = " Or give the schedule a lower min_scale." if now.at_floor else ""
    return (
        " If the loss is a sum over the batch, or sample weights are large, gradients are too: "
        f"take means.{lower}"
    )


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}, ..." if len(names) > len(names[:3]) else shown
