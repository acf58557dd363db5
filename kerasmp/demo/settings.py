"""What the demo can train, and the checked settings of one demo."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kerasmp.errors import ArgumentTypeError, KerasMPError, checked_integer, did_you_mean
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale

if TYPE_CHECKING:
    from collections.abc import Sequence

DIGITS = "kerasmp_digits"

# A user of the dynamic default (2**15, doubled every 2,000 good steps) would see a straight line in
# so short a demo. Starting at the top makes the scale come down by skipping, and a short interval
# makes it probe upwards again, so that both halves of the rule are on the plot.
DEMO_DYNAMIC = DynamicLossScale(initial_scale=2.0**24, growth_interval=100)
_STEPS_PER_HALVING = 8  # a short run starts lower, so as not to spend itself on coming down


class DemoError(KerasMPError, ValueError):
    """A setting of the demo, or a data set, that the demo cannot use."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train: a policy and what happens to the loss.

    Args:
        name: What `--policies` calls it.
        policy: The name of the Keras policy that the model is built under.
        loss_scale: The schedule; None trains with a plain optimizer.
        guarded: Whether skipped steps leave no trace (`kerasmp.Model`) or nothing looks at the
            gradients at all (stock `keras.Model`, automatic scaling switched off).
        summary: One line for a reader.
    """

    name: str
    policy: str
    loss_scale: LossScale | None
    guarded: bool
    summary: str

    def within(self, steps: int) -> Recipe:
        """Return the recipe for a run of so many steps: short ones start at a lower scale."""
        if not isinstance(self.loss_scale, DynamicLossScale):
            return self
        doublings = min(steps // _STEPS_PER_HALVING, 64)
        affordable = DynamicLossScale().initial_scale * 2.0**doublings
        start = min(self.loss_scale.initial_scale, affordable)
        schedule = dataclasses.replace(self.loss_scale, initial_scale=start)
        return dataclasses.replace(self, loss_scale=schedule, summary=_dynamic_summary(schedule))


def _dynamic_summary(schedule: DynamicLossScale) -> str:
    return (
        f"float16, the loss scaled dynamically: from {schedule.initial_scale:,.0f}, doubled "
        f"after {schedule.growth_interval} good steps."
    )


RECIPES: tuple[Recipe, ...] = (
    Recipe("float32", "float32", None, True, "The reference: everything in float32."),
    Recipe(
        "mixed_bfloat16",
        "mixed_bfloat16",
        None,
        True,
        "bfloat16 has float32's range: no loss scaling is needed.",
    ),
    Recipe(
        "mixed_float16",
        "mixed_float16",
        DEMO_DYNAMIC,
        True,
        _dynamic_summary(DEMO_DYNAMIC),
    ),
    Recipe(
        "mixed_float16_fixed",
        "mixed_float16",
        FixedLossScale(),
        True,
        f"float16 with the loss always scaled by {FixedLossScale().initial_scale:,.0f}.",
    ),
    Recipe(
        "mixed_float16_unscaled",
        "mixed_float16",
        None,
        False,
        "The cautionary case: float16, the loss not scaled, no check, stock keras.Model.",
    ),
)


def recipes_named(names: Sequence[str]) -> tuple[Recipe, ...]:
    """Return the recipes of these names, in the order of `RECIPES` and each once.

    Args:
        names: Names of recipes.

    Returns:
        The recipes; all of them if `names` is empty.

    Raises:
        DemoError: If a name is unknown.

    Example:

    >>> [recipe.name for recipe in recipes_named(["mixed_float16", "float32"])]
    ['float32', 'mixed_float16']
    """
    known = [recipe.name for recipe in RECIPES]
    for name in names:
        if name not in known:
            raise DemoError(
                "The demo has no policy of this name.",
                received=repr(name),
                expected=", ".join(known),
                fix=did_you_mean(name, known),
            )
    return tuple(recipe for recipe in RECIPES if not names or recipe.name in names)


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What to train, on what, and for how long; checked when it is made.

    Args:
        dataset: Name of a tfds data set that is prepared on disk, as "name", "name/config" or
            "name:1.2.3"; the default is the digits that ship inside scikit-learn.
        data_dir: Folder with prepared data sets; None means the user's cache for the digits and
            tfds's own default folder for all others.
        epochs: Passes over the training images.
        policies: Names of recipes; empty means all.
        seed: Decides initial weights and the order of the images, the same for every recipe.
        batch_size: Images a step.
        limit: Use at most this many training and this many test images; None means all.

    Raises:
        DemoError: For a value that cannot work.
        ArgumentTypeError: For a number that is no integer.

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
                value = checked_integer(name, value, DemoError, least)
            object.__setattr__(self, name, value)
        if self.seed >= 2**32:
            raise DemoError("`seed` is too large.", received=f"{self.seed}", expected="< 2**32")
        given: Any = self.policies
        if isinstance(given, str) or not all(isinstance(name, str) for name in given):
            raise ArgumentTypeError(
                "`policies` is no tuple of names.",
                received=repr(given),
                expected="names of recipes in a tuple",
                fix='For example policies=("mixed_float16",).',
            )
        recipes_named(self.policies)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes to train, in the order of `RECIPES`."""
        return recipes_named(self.policies)

    @property
    def folder(self) -> Path:
        """The folder in which to look for the data set."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser()
        if self.dataset == DIGITS:
            cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
            return Path(cache).expanduser() / "kerasmp" / "tfds"
        # The same rule as tfds, which reads this variable too.
        return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
