"""Conversions of drawn models that break off, go through text and files, and train."""

import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import zoo, zoo_facts
from helpers.interrupting import interrupted
from helpers.marks import full_on
from helpers.zoo_drawn import FEW, HOLDING, POLICIES, feasible, recipes
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import kerasmp as mp

JAX = keras.backend.backend() == "jax"
ZOO = settings(
    max_examples=5 if JAX else 12,  # JAX compiles each operation of each model
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # to explain takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)
POLICY = st.sampled_from(POLICIES)
HALF = st.sampled_from(POLICIES[:2])
RULES = st.sampled_from(["safe", None])
QUICK = pytest.mark.parametrize("recipe", FEW.values(), ids=FEW)

# Keras says so when such a part comes after a mask, which is what may be drawn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning"),
    # Without rules, float16 does overflow.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    # A part may have been drawn that no output comes from.
    pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning"),
]


def compiled(recipe, policy="float32"):
    model = zoo.fresh(recipe, policy)
    model.compile("adam", "mse", run_eagerly=not JAX)
    return model


@pytest.mark.full
@ZOO
@given(recipes(), HALF, RULES, st.integers(0, 500))
@example(HOLDING, "mixed_bfloat16", "safe", 150)
def test_one_that_breaks_off_leaves_all_as_it_was(recipe, policy, rules, number):
    check_breaking_off(recipe, policy, rules, number)


@full_on("jax")
@QUICK
def test_a_few_that_break_off_leave_all_as_they_were(recipe):
    for number in (60, 120, 180):
        assert check_breaking_off(recipe, "mixed_bfloat16", "safe", number)


def check_breaking_off(recipe, policy, rules, number):
    """Return whether the conversion made so many calls that it was broken off."""
    model = compiled(recipe)
    before = zoo_facts.everything(model, recipe)
    reports = []

    def convert():
        reports.append(mp.convert(model, feasible(recipe, policy), rules=rules))

    broken = interrupted(convert, number)
    if not broken:
        reports[0].restore()
    assert zoo_facts.everything(model, recipe) == before
    return broken


@pytest.mark.full
@ZOO
@given(recipes(), POLICY, POLICY, RULES)
def test_text_and_files_bring_back_the_same(recipe, policy, other, rules):
    check_text_and_files(recipe, policy, other, rules)


@full_on("jax")
@QUICK
def test_text_and_files_bring_back_a_few(recipe):
    check_text_and_files(recipe, "mixed_bfloat16", "mixed_float16", "safe")


def check_text_and_files(recipe, policy, other, rules):
    policy, other = feasible(recipe, policy), feasible(recipe, other)
    model = zoo.fresh(recipe)
    report = mp.convert(model, policy, rules=rules)
    wanted = zoo_facts.policies(model), zoo_facts.symbols(model), zoo.outputs(model, recipe)
    again = zoo.fresh(recipe)
    mp.convert(again, mp.LayerPolicies.parse(str(report.layer_policies)))
    assert zoo_facts.policies(again) == wanted[0]
    assert zoo_facts.symbols(again) == wanted[1]
    assert zoo.outputs(again, recipe) == wanted[2]
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model.keras"))
        keras.config.set_dtype_policy(other)
        loaded = keras.models.load_model(Path(folder, "model.keras"))
    assert isinstance(loaded, mp.Model)
    assert zoo_facts.policies(loaded) == wanted[0]
    assert zoo_facts.weights(loaded) == zoo_facts.weights(model)
    assert zoo.outputs(loaded, recipe) == wanted[2]


@pytest.mark.full
@settings(ZOO, max_examples=3 if JAX else 12)
@given(recipes(), HALF)
def test_training_goes_on_in_float32_variables(recipe, policy):
    heads = [head._replace(activation=head.activation or "linear") for head in recipe.heads]
    recipe = recipe._replace(heads=tuple(heads))  # without a Dense there may be nothing to train
    model = compiled(recipe)
    mp.convert(model, feasible(recipe, policy))
    model.train_on_batch(zoo.data(recipe), zoo.targets(model, recipe))
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    for variable in model.trainable_variables:
        assert np.isfinite(keras.ops.convert_to_numpy(variable.value)).all(), variable.path
    if model.optimizer.name == "loss_scale_optimizer":
        assert not model.optimizer.last_step_skipped
