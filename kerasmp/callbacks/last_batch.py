"""Keeps the last batch that a model was trained on, for `OverflowMonitor(keep_batch=True)`."""

from __future__ import annotations

from typing import Any

import keras

from kerasmp.backend import current


class LastBatch:
    """The train function of a model, which notes the batch of each call before it runs it.

    Not a function that refers to itself, for the same reason as in `kerasmp.model.first_batch`.

    Attributes:
        function: The train function that it stands for.
        batch: The last batch, as Keras passes it; None if it cannot be had without losing it.
    """

    def __init__(self, model: Any) -> None:
        self.function = model.train_function
        self.batch: Any = None
        self._steps = model.steps_per_execution

    def __call__(self, *arguments: Any) -> Any:
        """Note the next batch, and run the train function."""
        *state, source = arguments
        self.batch, source = current().peek(source, self._steps)
        return self.function(*state, source)

    def arguments(self) -> dict[str, Any] | None:
        """Return the last batch as arguments of `diagnose`: arrays by `x`, `y`, `sample_weight`."""
        if self.batch is None:
            return None
        parts = keras.utils.unpack_x_y_sample_weight(self.batch)
        arrays = [keras.tree.map_structure(_array, part) for part in parts]
        return dict(zip(("x", "y", "sample_weight"), arrays, strict=True))


def _array(each: Any) -> Any:
    return keras.ops.convert_to_numpy(each) if keras.ops.is_tensor(each) else each


def keep_last_batch(model: Any) -> LastBatch | None:
    """Let a model's train function note its batches; None if the model has no train function."""
    stop_keeping(model)  # after a `fit` that an error has ended
    if not callable(model.train_function):  # a user's own `fit`
        return None
    kept = model.train_function = LastBatch(model)
    return kept


def stop_keeping(model: Any) -> None:
    """Give a model its train function back."""
    if isinstance(model.train_function, LastBatch):
        model.train_function = model.train_function.function
