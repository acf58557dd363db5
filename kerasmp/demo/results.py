"""The results of the demo, as plain frozen values."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kerasmp.demo.environment import Environment
    from kerasmp.demo.settings import DemoSettings, Recipe

# Exponents of float16. Its smallest subnormal number is 2**-24, half of which rounds to 0. Its
# smallest normal number is 2**-14. Numbers from 65520, just below 2**16, round to infinity.
FLOAT16_SMALLEST = -24
FLOAT16_NORMAL = -14
FLOAT16_OVERFLOW = 16


@dataclasses.dataclass(frozen=True)
class ScaleReading:
    """The loss scale at one moment of training.

    Args:
        step: The number of steps so far.
        scale: The scale.
        skipped: The number of steps skipped since the previous reading.
    """

    step: int
    scale: float
    skipped: int


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of training under one recipe.

    Args:
        recipe: The recipe.
        loss: The training loss of each epoch.
        test_loss: The loss on the test images after each epoch.
        test_accuracy: The accuracy on the test images after each epoch.
        steps: The total number of steps.
        seconds_per_step: The wall time of one step: the median over the epochs, without the first
            epoch if there are more. The first step of each epoch does not count, because the very
            first one compiles. NaN if an epoch has a single step.
        seconds: The wall time of the whole run.
        skipped_steps: The number of skipped steps; None if the loss is not scaled.
        final_scale: The scale at the end; None if the loss is not scaled.
        scales: The scale over time; empty if the loss is not scaled.
        activation_bytes: The size of the layer outputs for one batch, from shapes and dtypes.
        weight_bytes: The size of the model's variables.
        warnings: The warnings that kerasmp gave during training.
    """

    recipe: Recipe
    loss: tuple[float, ...]
    test_loss: tuple[float, ...]
    test_accuracy: tuple[float, ...]
    steps: int
    seconds_per_step: float
    seconds: float
    skipped_steps: int | None
    final_scale: float | None
    scales: tuple[ScaleReading, ...]
    activation_bytes: int
    weight_bytes: int
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fate:
    """What float16 would make of nonzero values, as shares that sum to 1.

    Args:
        lost: The share that rounds to zero.
        subnormal: The share that keeps fewer than the usual 11 bits.
        kept: The share in the normal range.
        overflow: The share that becomes infinite.
    """

    lost: float
    subnormal: float
    kept: float
    overflow: float


@dataclasses.dataclass(frozen=True)
class ExponentHistogram:
    """The number of float32 values for each binary exponent.

    Args:
        name: "activations" or "weights", for gradients with respect to these.
        moment: When the gradients were taken: "start" or "end" of training.
        first: The exponent e of the first bin. A bin holds 2**e <= |x| < 2**(e+1).
        counts: The number of values in each bin.
        zeros: The number of values that are exactly zero in float32.
    """

    name: str
    moment: str
    first: int
    counts: tuple[int, ...]
    zeros: int

    def fate(self, scale: float = 1.0) -> Fate:
        """Return what float16 would make of these values, each multiplied by a scale.

        Args:
            scale: A power of two. Any other number is rounded down to one.

        Example:

        >>> ExponentHistogram("weights", "end", -30, (1,) * 8, 0).fate(2.0**8).lost
        0.0
        """
        exponents = np.arange(len(self.counts)) + self.first + math.floor(math.log2(scale))
        # [2**-25, 2**-24) rounds up to the smallest subnormal, except for 2**-25 itself.
        ends = (FLOAT16_SMALLEST - 1, FLOAT16_NORMAL, FLOAT16_OVERFLOW)
        ranges = np.searchsorted(ends, exponents, side="right")
        totals = np.bincount(ranges, weights=self.counts, minlength=4)
        return Fate(*(totals / max(sum(self.counts), 1)).tolist())


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """All results of one demo.

    Args:
        settings: The settings.
        environment: Versions and hardware.
        dataset: Name and version of the data set.
        image_shape: Height, width and channels.
        classes: The number of classes.
        train_images: The number of training images.
        test_images: The number of test images.
        learning_rate: The learning rate of Adam.
        parameters: The number of weights in the model.
        runs: The result of each recipe.
        histograms: The exponents of the gradients, at the start and at the end.
        seconds: The wall time of the whole demo.
    """

    settings: DemoSettings
    environment: Environment
    dataset: str
    image_shape: tuple[int, int, int]
    classes: int
    train_images: int
    test_images: int
    learning_rate: float
    parameters: int
    runs: tuple[RunResult, ...]
    histograms: tuple[ExponentHistogram, ...]
    seconds: float
