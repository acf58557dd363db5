"""Settings are checked when they are made, and errors say what is valid."""

import dataclasses
from pathlib import Path

import pytest

from kerasmp.demo import RECIPES, DemoError, DemoSettings
from kerasmp.errors import ArgumentTypeError, KerasMPError
from kerasmp.policy import Policy

pytestmark = pytest.mark.unit


def test_all_recipes_by_default_and_each_policy_exists():
    assert DemoSettings().recipes == RECIPES
    assert [recipe.name for recipe in RECIPES] == [
        "float32",
        "mixed_bfloat16",
        "mixed_float16",
        "mixed_float16_fixed",
        "mixed_float16_unscaled",
    ]
    for recipe in RECIPES:
        assert Policy(recipe.policy).name == recipe.policy


def test_only_the_cautionary_recipe_is_unguarded_and_only_float16_is_scaled():
    assert [recipe.name for recipe in RECIPES if not recipe.guarded] == ["mixed_float16_unscaled"]
    scaled = [recipe.name for recipe in RECIPES if recipe.loss_scale is not None]
    assert scaled == ["mixed_float16", "mixed_float16_fixed"]


def test_a_short_run_starts_at_a_lower_scale_and_says_so():
    recipe = RECIPES[2]
    starts = [recipe.within(steps).loss_scale.initial_scale for steps in (1, 8, 40, 72, 10**6)]
    assert starts == [2.0**15, 2.0**16, 2.0**20, 2.0**24, 2.0**24]
    assert "from 65,536, doubled after 100 good steps" in recipe.within(8).summary
    assert recipe.within(72) == recipe
    others = RECIPES[:2] + RECIPES[3:]
    assert [one.within(1) for one in others] == list(others)


def test_chosen_recipes_come_once_and_in_the_tables_order():
    settings = DemoSettings(policies=("mixed_float16", "float32", "mixed_float16"))
    assert [recipe.name for recipe in settings.recipes] == ["float32", "mixed_float16"]


def test_unknown_policy_lists_the_known_and_names_the_nearest():
    with pytest.raises(DemoError) as caught:
        DemoSettings(policies=("mixed_flaot16",))
    message = str(caught.value)
    assert "'mixed_flaot16'" in message
    assert "float32, mixed_bfloat16, mixed_float16," in message
    assert message.endswith('Did you mean "mixed_float16"?')


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("seed", -1), ("seed", 2**32), ("batch_size", 0), ("limit", 0)],
)
def test_numbers_out_of_range(name, value):
    with pytest.raises(DemoError, match=rf"`{name}`.*Received: {value}.*Expected: ") as caught:
        DemoSettings(**{name: value})
    assert isinstance(caught.value, KerasMPError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [1.5, "3", True])
def test_numbers_of_the_wrong_type(value):
    with pytest.raises(ArgumentTypeError, match="`epochs` has an invalid value"):
        DemoSettings(epochs=value)


@pytest.mark.parametrize("value", [3, None, "float32", (1,)])
def test_policies_that_are_no_names(value):
    with pytest.raises(ArgumentTypeError, match="`policies` has an invalid value"):
        DemoSettings(policies=value)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DemoSettings().epochs = 3


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    assert DemoSettings().folder == tmp_path / "kerasmp" / "tfds"
    assert DemoSettings(dataset="mnist").folder == tmp_path / "mine"
    assert DemoSettings(dataset="mnist", data_dir="~/x").folder == Path("~/x").expanduser()
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert DemoSettings(dataset="m").folder == Path("~/tensorflow_datasets").expanduser()
