"""The results of a demo, as plain frozen values."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kerasmp.demo.environment import Environment
    from kerasmp.demo.settings import DemoSettings, Recipe

# Exponents of float16. The smallest subnormal number is 2**-24, and half of it rounds to 0. The
# smallest normal number is 2**-14. Numbers from 65520, just below 2**16, round to infinity.
FLOAT16_SMALLEST = -24
FLOAT16_NORMAL = -14
FLOAT16_OVERFLOW = 16


@dataclasses.dataclass(frozen=True)
class ScaleReading:
    """The loss scale at one moment of training.

    Args:
        step: Steps so far.
        scale: The scale.
        skipped: Steps skipped since the reading before.
    """

    step: int
    scale: float
    skipped: int


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of training under one recipe.

    Args:
        recipe: The recipe.
        loss: Training loss of each epoch.
        test_loss: Loss on the test images after each epoch.
        test_accuracy: Accuracy on the test images after each epoch.
        steps: All steps.
        seconds_per_step: Wall time of one step: the median over the epochs, without the first epoch
            if there are more. The first step of an epoch is left out, since the very first one
            compiles. NaN if an epoch is a single step.
        seconds: Wall time of the whole run.
        skipped_steps: Number of skipped steps; None if the loss is not scaled.
        final_scale: The scale at the end; None if the loss is not scaled.
        scales: The scale over time; empty if the loss is not scaled.
        activation_bytes: Size of the layers' outputs for one batch, from shapes and dtypes.
        weight_bytes: Size of the model's variables.
        warnings: The warnings of kerasmp during training.
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
    """The shares of non-zero values by what float16 would make of them. They sum to 1.

    Args:
        lost: The share that rounds to zero.
        subnormal: The share that has fewer than the usual 11 bits.
        kept: The share in the normal range.
        overflow: The share that becomes infinity.
    """

    lost: float
    subnormal: float
    kept: float
    overflow: float


@dataclasses.dataclass(frozen=True)
class ExponentHistogram:
    """How many values have which binary exponent, from a computation in float32.

    Args:
        name: What the values are: "activations" or "weights" (the gradients with respect to them).
        moment: When they were taken: "start" or "end" of training.
        first: The exponent of the first bin. A bin holds 2**e <= |x| < 2**(e+1).
        counts: The number of values in each bin.
        zeros: The number of values that are exactly zero in float32.
    """

    name: str
    moment: str
    first: int
    counts: tuple[int, ...]
    zeros: int

    def fate(self, scale: float = 1.0) -> Fate:
        """Return what float16 would make of these values, each times a scale.

        Args:
            scale: A power of two. Any other number counts as the next lower one.

        Example:

        >>> ExponentHistogram("weights", "end", -30, (1,) * 8, 0).fate(2.0**8).lost
        0.0
        """
        exponents = np.arange(len(self.counts)) + self.first + math.floor(math.log2(scale))
        # [2**-25, 2**-24) rounds up to the smallest subnormal, except for 2**-25 itself.
        ends = (FLOAT16_SMALLEST - 1, FLOAT16_NORMAL, FLOAT16_OVERFLOW)
        parts = np.searchsorted(ends, exponents, side="right")
        values = np.bincount(parts, weights=self.counts, minlength=4)
        return Fate(*(values / max(sum(self.counts), 1)).tolist())


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """All results of one demo.

    Args:
        settings: The settings.
        environment: Versions and hardware.
        dataset: Name and version of the data set.
        image_shape: Height, width and channels.
        classes: Number of classes.
        train_images: Number of training images.
        test_images: Number of test images.
        learning_rate: The learning rate of Adam.
        parameters: Number of the model's weights.
        runs: The result of each recipe.
        histograms: The exponents of the gradients, at the start and at the end.
        seconds: Wall time of the whole demo.
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
