"""Predicts from gradients in float32 what float16 does to them at each loss scale."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from kerasmp.diagnosis.diagnose import diagnose
from kerasmp.diagnosis.result import SMALLEST, Underflow, underflow
from kerasmp.errors import ArgumentError, check_integer, with_type
from kerasmp.probe.magnitudes import Magnitudes

# How much larger than in the batches that were looked at gradients may become: 8 times.
_HEADROOM = 8.0
# Powers of two around those that hold all gradients, in the table.
_AROUND = 2
# Each so many of them is a row of the table.
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What float16 does to gradients at a loss scale.

    Attributes:
        scale: The scale.
        overflow: The share of gradients that become inf.
        underflow: The share that become 0.
    """

    scale: float
    overflow: float
    underflow: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Which loss scale a model needs.

    Attributes:
        scale: The fixed scale to take: the largest power of two that leaves the gradients room to
            grow by a factor of 8. 1 if there is none.
        predictions: What float16 does to the gradients at each power of two around the useful ones.
        bfloat16: Whether bfloat16 would do better.
        reason: Why.
        batches: How many batches were looked at.

    Example:

    >>> from kerasmp.probe.magnitudes import magnitudes
    >>> import numpy as np
    >>> calibration(magnitudes(np.array([1.0, 2.0**-10])), 1).scale
    4096.0
    """

    scale: float
    predictions: tuple[Prediction, ...]
    bfloat16: bool
    reason: str
    batches: int

    def __str__(self) -> str:
        rows = [
            f"{each.scale:12g} {each.overflow:9.2%} {each.underflow:9.2%}"
            + ("  <- take this" if each.scale == self.scale else "")
            for i, each in enumerate(self.predictions)
            if i % _SHOWN == 0 or each.scale == self.scale
        ]
        return "\n".join(["       scale  become inf  become 0", *rows, self.reason])


def calibrate(model: Any, data: Any, *, batches: int = 4, verbose: bool = True) -> Calibration:
    """Find the fixed loss scale for a model, and whether bfloat16 would do better.

    It computes the gradients of some batches in float32, as `diagnose` does, and counts their
    exponents. A multiplication by a power of two only moves these, so what float16 does to the
    gradients at any scale is known without trying it. The model does not change.

    Args:
        model: A compiled model. If no layer computes in half precision, the gradients of all layers
            count.
        data: A batch `(x, y)` or `(x, y, sample_weight)`; or batches of this form that can be
            iterated over more than once, such as a list, `tf.data.Dataset`, `PyDataset` or
            `DataLoader`.
        batches: The most batches to look at, default 4.
        verbose: Whether to show a progress bar, default True.

    Returns:
        A `Calibration`, which prints as a table.

    Raises:
        ArgumentError: If `data` is an iterator, whose batches would be lost, or has no batch.
        NotCompiledError: If the model is not compiled.

    Example:

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> found = calibrate(model, (np.ones((8, 4)), np.ones((8, 1))), verbose=False)
    >>> found.scale >= 1, found.bfloat16, found.batches
    (True, False, 1)
    """
    count = check_integer("batches", batches, ArgumentError)
    chosen = list(itertools.islice(_batches(data), count))
    if not chosen:
        raise ArgumentError(
            "`data` has no batch.",
            received=with_type(data),
            expected="a batch (x, y), or batches",
            fix="Pass what you train on.",
        )
    seen = Magnitudes()
    bar = keras.utils.Progbar(len(chosen), verbose=int(verbose), unit_name="batch")
    for batch in chosen:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        found = diagnose(model, x, y, sample_weight=sample_weight, loss_scale=1.0)
        rows = [row for row in found.layers if row.direction != "forward"]
        halves = [row for row in rows if row.dtype != "float32"]
        seen = sum((row.magnitudes for row in halves or rows), seen)
        bar.add(1)
    return calibration(seen, len(chosen))


def _batches(data: Any) -> Iterator[Any]:
    if isinstance(data, Iterator) or not isinstance(data, (Iterable, keras.utils.PyDataset)):
        raise ArgumentError(
            "`data` is neither a batch nor batches that can be iterated over twice.",
            received=with_type(data),
            expected="a batch (x, y), or batches that can be iterated over more than once",
            fix="Take a batch out of it, and pass that.",
        )
    if isinstance(data, keras.utils.PyDataset):
        return (data[i] for i in range(len(data)))
    is_batch = isinstance(data, (tuple, dict)) or hasattr(data, "shape")
    return iter([data] if is_batch else data)


def calibration(gradients: Magnitudes, batches: int) -> Calibration:
    """Return what magnitudes of unscaled gradients say.

    Args:
        gradients: The magnitudes.
        batches: Of how many batches.
    """
    scales = underflow(gradients, 1.0)
    if gradients.nonfinite:
        reason = "Gradients are inf or NaN in float32: pass the batch to kerasmp.diagnose."
        return Calibration(1.0, (), False, reason, batches)
    if scales.largest_scale is None:
        return Calibration(1.0, (), False, "There are no gradients.", batches)
    scale = max(1.0, scales.largest_scale / _HEADROOM)
    least = min(scales.scale or scale, scale)
    first, last = least / 2.0**_AROUND, scales.largest_scale * 2.0**_AROUND
    powers = itertools.takewhile(lambda s: s <= last, (first * 2.0**k for k in itertools.count()))
    counting = gradients.at_least(SMALLEST)
    predictions = tuple(
        Prediction(s, gradients.overflowing(s), counting.vanishing(s)) for s in powers
    )
    return Calibration(scale, predictions, *_better_in_bfloat16(scales, scale), batches)


def _better_in_bfloat16(scales: Underflow, scale: float) -> tuple[bool, str]:
    """Return whether bfloat16 would do better, and why."""
    if scales.scale is not None and scales.scale > scale:
        return True, (
            f"bfloat16 would do better: float16 needs a scale of {scales.scale:g} so that fewer "
            f"than 1 in 1000 gradients become 0, and leaves no room to grow above {scale:g}. "
            "bfloat16 has the range of float32."
        )
    return False, (
        "bfloat16 would not do better: with such a scale float16 holds the gradients, and rounds "
        "to 11 bits where bfloat16 rounds to 8."
    )
