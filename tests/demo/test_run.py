"""Every recipe trains from the same start, and the results report what happened."""

import dataclasses
import math
import warnings

import keras
import numpy as np
import pytest

from kerasmp.demo import RECIPES, DemoError, DemoSettings, run, run_demo, settings
from kerasmp.errors import LossScaleWarning
from kerasmp.loss_scale import FixedLossScale
from kerasmp.policy import global_policy


@pytest.fixture
def no_disk(monkeypatch, images):
    """Make `run_demo` train on `images`, so that it needs only Keras."""
    monkeypatch.setattr(run, "load", lambda _: images)


@pytest.fixture(scope="module")
def everything(images):
    """One demo with all recipes: two epochs of three steps."""
    events = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load", lambda _: images)
        patch.setattr(
            settings, "_STEPS_PER_HALVING", 1
        )  # 2**21 at the start, so the scale must fall within 6 steps
        before = global_policy()
        result = run_demo(DemoSettings(epochs=2, batch_size=16), progress=events.append)
        assert global_policy() == before  # it is not changed
    return result, events


def test_one_result_for_each_recipe_with_one_value_for_each_epoch(everything):
    result, _ = everything
    assert [one.recipe.name for one in result.runs] == [one.name for one in RECIPES]
    for one in result.runs:
        assert one.steps == 6
        assert len(one.loss) == len(one.test_loss) == len(one.test_accuracy) == 2
        assert 0 < one.seconds_per_step < one.seconds < result.seconds
        assert all(0 <= accuracy <= 1 for accuracy in one.test_accuracy)


def test_the_same_start_and_order_give_nearly_the_same_loss(everything):
    result, _ = everything
    # The dynamic run skips these few steps, since its scale starts too high.
    losses = [one.loss[0] for one in result.runs if one.recipe.name != "mixed_float16"]
    # Measured: 0.0001 apart; in another order of the batches, 0.01.
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.002)


def test_what_scaling_did_is_counted(everything):
    result, _ = everything
    by_name = {one.recipe.name: one for one in result.runs}
    for name in ("float32", "mixed_bfloat16", "mixed_float16_unscaled"):
        one = by_name[name]
        assert (one.skipped_steps, one.final_scale, one.scales) == (None, None, ())
    dynamic, fixed = by_name["mixed_float16"], by_name["mixed_float16_fixed"]
    start = 2.0**21
    assert dynamic.skipped_steps > 0
    assert dynamic.final_scale == start / 2**dynamic.skipped_steps
    assert dynamic.scales[0].step == 0
    assert dynamic.scales[0].scale == start
    assert [one.step for one in dynamic.scales] == [0, 1, 3, 4, 6]
    assert sum(one.skipped for one in dynamic.scales) == dynamic.skipped_steps
    assert fixed.final_scale == FixedLossScale().initial_scale
    assert fixed.skipped_steps == 0


def test_low_precision_halves_most_activations_and_no_weight(everything):
    result, _ = everything
    full, *others = result.runs
    for one in others:
        assert 0.5 < one.activation_bytes / full.activation_bytes < 0.55
        assert one.weight_bytes == full.weight_bytes


def test_progress_tells_begin_and_end_of_each_run(everything):
    result, events = everything
    assert [event.recipe for event in events if event.step == 0] == [
        one.recipe.name for one in result.runs
    ]
    ends = [event for event in events if event.finished]
    assert [event.run for event in ends] == [1, 2, 3, 4, 5]
    assert all(event.step == event.steps == 6 and event.runs == 5 for event in ends)
    assert [event.loss for event in ends] == [one.loss[-1] for one in result.runs]


def test_exponents_of_both_kinds_before_and_after(everything):
    result, _ = everything
    assert [(one.name, one.moment) for one in result.histograms] == [
        ("activations", "start"),
        ("weights", "start"),
        ("activations", "end"),
        ("weights", "end"),
    ]
    assert result.histograms[0].counts != result.histograms[2].counts


def test_facts_about_data_and_environment(everything):
    result, _ = everything
    assert (result.dataset, result.image_shape, result.classes) == ("stripes 1.0.0", (8, 8, 1), 4)
    assert (result.train_images, result.test_images) == (48, 20)
    assert result.environment.backend == keras.backend.backend()
    assert result.environment.versions["keras"] == keras.__version__


@pytest.mark.full
@pytest.mark.usefixtures("no_disk")
def test_the_network_learns_and_the_seed_decides(everything):
    settings = DemoSettings(epochs=2, batch_size=16, policies=("float32",))
    first, again = everything[0].runs[0], run_demo(settings).runs[0]
    assert again.loss == pytest.approx(first.loss, rel=1e-3)
    other = run_demo(dataclasses.replace(settings, seed=1, epochs=16)).runs[0]
    assert other.loss[0] != pytest.approx(first.loss[0], rel=1e-3)
    assert other.loss[-1] < other.loss[0] / 2
    assert other.test_accuracy[-1] > 0.5


@pytest.mark.usefixtures("no_disk")
def test_one_step_an_epoch_has_no_time_a_step():
    result = run_demo(DemoSettings(epochs=1, batch_size=48, policies=("float32",)))
    assert math.isnan(result.runs[0].seconds_per_step)


@pytest.mark.unit
@pytest.mark.usefixtures("no_disk")
def test_fewer_images_than_a_batch_is_an_error():
    with pytest.raises(DemoError, match=r"Received: 48 images, 64 a step"):
        run_demo(DemoSettings(batch_size=64))


@pytest.mark.unit
def test_batches_are_full_and_reshuffled_and_each_time_the_same(images):
    settings = DemoSettings(batch_size=20, seed=3)
    batches = run._Batches(images.train, settings)
    assert len(batches) == 2
    first = np.concatenate([batches[0][1], batches[1][1]])
    batches.on_epoch_end()
    assert not np.array_equal(np.concatenate([batches[0][1], batches[1][1]]), first)
    batches = run._Batches(images.train, settings)
    np.testing.assert_array_equal(np.concatenate([batches[0][1], batches[1][1]]), first)
    assert batches[0][0].dtype == "float32"


@pytest.mark.unit
def test_warnings_of_kerasmp_are_kept_and_others_passed_on():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("mind the scale", LossScaleWarning, stacklevel=1)
        warnings.warn("somebody else's", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="somebody else's") as handed_on:
        assert run._kerasmp_warnings(caught) == ("mind the scale",)
    assert len(handed_on) == 1
