"""The recipes of the demo, and the settings of one demo."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kerasmp.errors import ArgumentTypeError, KerasMPError, check_integer, did_you_mean
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale

DIGITS = "kerasmp_digits"

# With the default schedule, the scale would not change in such a short demo. Here it starts at
# 2**24, so that it must come down, and grows after 100 good steps. A short run starts lower: one
# halving for each 8 steps that it lacks.
_INITIAL_EXPONENT = 24
_GROWTH_INTERVAL = 100
_STEPS_PER_HALVING = 8


class DemoError(KerasMPError, ValueError):
    """Raised if the demo cannot use a setting or a data set."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train: a policy and a loss-scale schedule.

    Args:
        name: Its name in `--policies`.
        policy: The name of the Keras policy under which the model is built.
        loss_scale: The schedule; None for a plain optimizer.
        guarded: Whether the model is a `kerasmp.Model`, in which skipped steps leave no trace. If
            not, it is a stock `keras.Model` without automatic loss scaling, and nothing checks the
            gradients.
        summary: A one-line description.
    """

    name: str
    policy: str
    loss_scale: LossScale | None
    guarded: bool
    summary: str

    def within(self, steps: int) -> Recipe:
        """Return the recipe for a run of `steps` steps. A short run starts at a lower scale."""
        if not isinstance(self.loss_scale, DynamicLossScale):
            return self
        default = int(math.log2(DynamicLossScale().initial_scale))
        return _dynamic(min(default + steps // _STEPS_PER_HALVING, _INITIAL_EXPONENT))


def _dynamic(exponent: int) -> Recipe:
    schedule = DynamicLossScale(2.0**exponent, growth_interval=_GROWTH_INTERVAL)
    summary = (
        f"float16 with a dynamic loss scale: from {schedule.initial_scale:,.0f}, doubled "
        f"after {schedule.growth_interval} good steps."
    )
    return Recipe("mixed_float16", "mixed_float16", schedule, guarded=True, summary=summary)


RECIPES: tuple[Recipe, ...] = (
    Recipe("float32", "float32", None, True, "The reference: everything in float32."),
    Recipe(
        "mixed_bfloat16",
        "mixed_bfloat16",
        None,
        True,
        "bfloat16 has float32's range: no loss scaling is needed.",
    ),
    _dynamic(_INITIAL_EXPONENT),
    Recipe(
        "mixed_float16_fixed",
        "mixed_float16",
        FixedLossScale(),
        True,
        f"float16 with a fixed loss scale of {FixedLossScale().initial_scale:,.0f}.",
    ),
    Recipe(
        "mixed_float16_unscaled",
        "mixed_float16",
        None,
        False,
        "The cautionary case: float16 without loss scaling or checks, in a stock keras.Model.",
    ),
)


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What to train, on which data, and for how long.

    Args:
        dataset: A tfds data set that is prepared on disk: "name", "name/config" or "name:1.2.3".
            The default is the digits that ship with scikit-learn.
        data_dir: The folder with prepared data sets. None means the user's cache for the digits,
            and the default folder of tfds for all others.
        epochs: The number of passes over the training images.
        policies: Names of recipes. Empty means all.
        seed: Sets the initial weights and the order of the images, the same for every recipe.
        batch_size: The number of images in a step.
        limit: Use at most this many training and this many test images. None means all.

    Raises:
        DemoError: If a value is out of range, or a recipe is unknown.
        ArgumentTypeError: If a number is not an integer, or `policies` is not a list of strings.

    Example:

    >>> DemoSettings(epochs=2, policies=("float32",)).recipes[0].policy
    'float32'
    """

    dataset: str = DIGITS
    data_dir: Path | None = None
    epochs: int = 12
    policies: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 32
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "seed": 0, "limit": 1}.items():
            value = getattr(self, name)
            if name != "limit" or value is not None:
                value = check_integer(name, value, DemoError, least)
            object.__setattr__(self, name, value)
        if self.seed >= 2**32:
            raise DemoError("`seed` is too large.", received=f"{self.seed}", expected="< 2**32")
        given: Any = self.policies
        is_list = isinstance(given, Collection) and not isinstance(given, str)
        if not (is_list and all(isinstance(name, str) for name in given)):
            raise ArgumentTypeError(
                "`policies` has an invalid value.",
                received=repr(given),
                expected="a tuple of recipe names",
                fix='For example, pass policies=("mixed_float16",).',
            )
        known = [recipe.name for recipe in RECIPES]
        for name in given:
            if name not in known:
                raise DemoError(
                    "The demo has no policy with this name.",
                    received=repr(name),
                    expected=", ".join(known),
                    fix=did_you_mean(name, known),
                )

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes to train, in the order of `RECIPES`, without duplicates."""
        return tuple(
            recipe for recipe in RECIPES if not self.policies or recipe.name in self.policies
        )

    @property
    def folder(self) -> Path:
        """The folder that contains the data set."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser()
        if self.dataset == DIGITS:
            cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
            return Path(cache).expanduser() / "kerasmp" / "tfds"
        # tfds follows the same rule.
        return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
