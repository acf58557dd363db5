"""What a demo found out: plain frozen values, no formatting."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kerasmp.demo.environment import Environment
    from kerasmp.demo.settings import DemoSettings, Recipe

# float16: the smallest subnormal is 2**-24 (half of it and less rounds to 0), the smallest normal
# 2**-14, and numbers from 65520, which is just below 2**16, round to infinity.
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
    """What training under one recipe gave.

    Args:
        recipe: What was trained.
        loss: Training loss of each epoch.
        test_loss: Loss on the test images after each epoch.
        test_accuracy: Accuracy on the test images after each epoch.
        steps: Steps in all.
        seconds_per_step: Wall time of one step, without the first, which compiles; the median over
            the epochs, without the first epoch if there are more. NaN if each epoch is one step.
        seconds: Wall time of the whole run.
        skipped_steps: Steps skipped in all; None if nothing watched.
        final_scale: The scale at the end; None if the loss is not scaled.
        scales: The scale over time; empty if the loss is not scaled.
        activation_bytes: Layer outputs of one batch, computed from shapes and dtypes.
        weight_bytes: The model's variables.
        warnings: What kerasmp warned about while it trained.
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
    """Which share of non-zero values would meet which end in float16; the four sum to 1.

    Args:
        lost: Rounds to zero.
        subnormal: Kept with fewer than the usual 11 bits.
        kept: In the normal range.
        overflow: Becomes infinity.
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
        first: The exponent of the first bin; a bin holds 2**e <= |x| < 2**(e+1).
        counts: Values in each bin.
        zeros: Values that are exactly zero in float32 too.
    """

    name: str
    moment: str
    first: int
    counts: tuple[int, ...]
    zeros: int

    def fate(self, scale: float = 1.0) -> Fate:
        """Return what float16 would do to these values, each times a scale.

        Args:
            scale: A power of two (of others, the next lower one counts).

        Example:

        >>> ExponentHistogram("weights", "end", -30, (1,) * 8, 0).fate(2.0**8).lost
        0.0
        """
        total = sum(self.counts)
        if not total:
            return Fate(0.0, 0.0, 0.0, 0.0)
        shift = self.first + math.floor(math.log2(scale))
        ends = {"lost": 0, "subnormal": 0, "kept": 0, "overflow": 0}
        for exponent, count in enumerate(self.counts, start=shift):
            ends[_end(exponent)] += count
        return Fate(**{name: count / total for name, count in ends.items()})


def _end(exponent: int) -> str:
    # [2**-25, 2**-24) rounds up to the smallest subnormal, but for 2**-25 itself.
    if exponent < FLOAT16_SMALLEST - 1:
        return "lost"
    if exponent < FLOAT16_NORMAL:
        return "subnormal"
    return "kept" if exponent < FLOAT16_OVERFLOW else "overflow"


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """Everything that one demo found out.

    Args:
        settings: What was asked for.
        environment: Versions and hardware.
        dataset: Name and version of the data set.
        image_shape: Height, width and channels.
        classes: Number of classes.
        train_images: Number of images trained on in an epoch.
        test_images: Number of images tested on.
        learning_rate: Of Adam.
        parameters: Number of the model's weights.
        runs: One for each recipe.
        histograms: Exponents of the gradients, by what and when.
        seconds: Wall time of everything.
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
