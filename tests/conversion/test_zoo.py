"""What holds of every conversion, on models of many kinds that are drawn."""

import warnings

import keras
import pytest
from helpers import zoo, zoo_facts
from helpers.flattened import flatten_layers
from helpers.marks import full_on
from helpers.zoo_drawn import FEW, HOLDING, POLICIES, built_alike, feasible, recipes
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import kerasmp as mp

JAX = keras.backend.backend() == "jax"
ZOO = settings(
    max_examples=6 if JAX else 16,  # JAX compiles each operation of each model
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # to explain takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
POLICY = st.sampled_from(POLICIES)
RULES = st.sampled_from(["safe", None])
QUICK = pytest.mark.parametrize("recipe", FEW.values(), ids=FEW)

pytestmark = [
    # Keras says so when such a part comes after a mask, which is what may be drawn.
    pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning"),
    # Without rules, float16 does overflow.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def check_rows(report, model):
    rows = [id(row.layer) for row in report.rows]
    inputs = keras.layers.InputLayer
    present = [id(each) for each in flatten_layers(model) if not isinstance(each, inputs)]
    assert sorted(rows) == sorted(set(present))
    assert len(rows) == len(set(rows))


def said(report):
    return [row[1:] for row in report.rows]


@pytest.mark.full
@ZOO
@given(recipes(), POLICY, POLICY, RULES)
@example(HOLDING, "float32", "mixed_bfloat16", None)
def test_there_twice_and_back(recipe, start, policy, rules):
    check_there_and_back(recipe, start, policy, rules)


@full_on("jax")
@QUICK
def test_a_few_go_there_twice_and_back(recipe):
    check_there_and_back(recipe, "float32", "mixed_bfloat16", "safe")


def check_there_and_back(recipe, start, policy, rules):
    start, policy = feasible(recipe, start), feasible(recipe, policy)
    model = zoo.fresh(recipe, start)
    steps = [object() for _ in zoo_facts.COMPILED]
    for name, step in zip(zoo_facts.COMPILED, steps, strict=True):
        setattr(model, name, step)
    before = zoo_facts.everything(model, recipe)
    dry = mp.convert(model, policy, rules=rules, dry_run=True)
    assert zoo_facts.everything(model, recipe) == before
    assert [getattr(model, name) for name in zoo_facts.COMPILED] == steps
    first = mp.convert(model, policy, rules=rules)
    once = zoo_facts.everything(model, recipe)
    assert said(first) == said(dry)
    assert first.layer_policies == dry.layer_policies
    assert once["weights"] == before["weights"]
    assert {v.dtype for v in model.trainable_variables} <= {"float32"}
    assert [getattr(model, name) for name in zoo_facts.COMPILED] == [None] * 3
    for report in (first, dry):
        check_rows(report, model)
    second = mp.convert(model, policy, rules=rules)
    assert zoo_facts.everything(model, recipe) == once
    assert second.layer_policies == first.layer_policies
    assert all(row.before == row.after for row in second.rows)
    second.restore()
    assert zoo_facts.everything(model, recipe) == once
    first.restore()
    assert zoo_facts.everything(model, recipe) == before


@pytest.mark.full
@ZOO
@given(recipes(overrides=False).filter(built_alike), POLICY, POLICY)
@example(HOLDING, "float32", "mixed_bfloat16")
def test_it_equals_building_under_the_policy(recipe, start, policy):
    check_against_building(recipe, start, policy)


@full_on("jax")
@QUICK
def test_for_a_few_it_equals_building_under_the_policy(recipe):
    check_against_building(recipe, "float32", "mixed_bfloat16")


def check_against_building(recipe, start, policy):
    # A Sequential without Input makes one of the dtype that its first layer computes in, which
    # rounds what goes in, and is the data's for a conversion.
    start = "float32" if recipe.shape == "deferred" else feasible(recipe, start)
    policy = feasible(recipe, policy)
    built, model = zoo.fresh(recipe, policy), zoo.fresh(recipe, start)
    mp.convert(model, policy, rules=None)
    same_model(model, built, recipe)
    mp.convert(model, "float32")
    assert {name for _, name in zoo_facts.policies(model)} == {"float32"}
    same_model(model, zoo.fresh(recipe), recipe)


KNOWING = ["functional", "sequential", "subclassed"]


# A Sequential that knows no shape yet knows of no mask, and has all pooling that may be masked in
# float32. Once it is built, a conversion knows better.
@pytest.mark.full
@ZOO
@given(recipes(overrides=False, shapes=KNOWING).filter(built_alike), POLICY)
def test_it_equals_building_under_the_rules(recipe, policy):
    policy = mp.Policy(feasible(recipe, policy), rules="safe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.errors.PolicyWarning)  # models inside are stock
        with mp.policy_scope(policy):
            built = zoo.fresh(recipe, None, ours=True)
    model = zoo.fresh(recipe)
    mp.convert(model, policy)
    same_model(model, built, recipe)


def same_model(model, other, recipe):
    assert zoo_facts.policies(model) == zoo_facts.policies(other)
    assert recipe.shape == "deferred" or zoo_facts.symbols(model) == zoo_facts.symbols(other)
    assert zoo_facts.weights(model) == zoo_facts.weights(other)
    assert zoo.outputs(model, recipe) == zoo.outputs(other, recipe)
