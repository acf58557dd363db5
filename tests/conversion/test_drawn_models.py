"""Convert models drawn at random: restore them, compare, interrupt, save, load and train them.

Hypothesis draws recipes, from which `helpers.drawn_models` builds models of many kinds.
"""

import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import drawn_models
from helpers.drawn_recipes import FEW, HOLDING, POLICIES, built_alike, feasible, recipes
from helpers.flattened import flatten_layers
from helpers.interrupting import interrupted
from helpers.marks import full_on
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from keras import ops

import kerasmp as mp

JAX = keras.backend.backend() == "jax"
DRAWN = settings(
    max_examples=5 if JAX else 14,  # JAX compiles each operation of each model
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
POLICY = st.sampled_from(POLICIES)
HALF = st.sampled_from(POLICIES[:2])
RULES = st.sampled_from(["safe", None])
QUICK = pytest.mark.parametrize("recipe", FEW.values(), ids=FEW)

pytestmark = [
    # Keras warns if such a layer comes after a mask, which a recipe may do.
    pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning"),
    # Without rules, float16 does overflow.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    # A drawn layer may be unconnected to the outputs.
    pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning"),
]

COMPILED = ("train_function", "test_function", "predict_function")


def policies(model):
    """Return the class and policy of each layer but InputLayers, outer layers first."""
    return [(each.class_name, each.policy) for each in mp.LayerPolicies.of(model)][1:]


def symbolic_dtypes(model):
    """Return the dtypes of all symbolic tensors in the graph of a model, by depth."""
    graph = model._functional if isinstance(model, keras.Sequential) else model
    by_depth = getattr(graph, "_nodes_by_depth", {})
    return [
        tensor.dtype
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        for tensor in node.output_tensors
    ]


def symbols(model):
    """Return the dtypes of all symbolic tensors, for the model and each model in it."""
    return [symbolic_dtypes(layer) for layer in flatten_layers(model)]


def weights(model):
    """Return the dtype and the bytes of each weight."""
    return [(v.dtype, ops.convert_to_numpy(v.value).tobytes()) for v in model.weights]


def optimizer_of(model):
    """Return the optimizer and the bytes of its variables."""
    found = getattr(model, "optimizer", None)
    values = [] if found is None else [ops.convert_to_numpy(v.value) for v in found.variables]
    return found, [value.tobytes() for value in values]


def everything(model, recipe):
    """Return everything that `restore` must restore."""
    return {
        "class": type(model),
        "policies": [layer.dtype_policy for layer in flatten_layers(model)],
        # TensorFlow sets private attributes at any time.
        "attributes": {name for name in vars(model) if not name.startswith("_self_")},
        "symbols": symbols(model),
        "weights": weights(model),
        "optimizer": optimizer_of(model),
        "outputs": drawn_models.outputs(model, recipe),
    }


def check_rows(report, model):
    rows = [id(row.layer) for row in report.rows]
    inputs = keras.layers.InputLayer
    present = [id(each) for each in flatten_layers(model) if not isinstance(each, inputs)]
    assert sorted(rows) == sorted(set(present))
    assert len(rows) == len(set(rows))


def said(report):
    return [row[1:] for row in report.rows]


@pytest.mark.full
@DRAWN
@given(recipes(), POLICY, POLICY, RULES)
@example(HOLDING, "float32", "mixed_bfloat16", None)
def test_converting_twice_changes_nothing_more_and_restore_undoes_it(recipe, start, policy, rules):
    check_there_and_back(recipe, start, policy, rules)


@full_on("jax")
@QUICK
def test_converting_twice_and_restoring_for_a_few_models(recipe):
    check_there_and_back(recipe, "float32", "mixed_bfloat16", "safe")


def check_there_and_back(recipe, start, policy, rules):
    start, policy = feasible(recipe, start), feasible(recipe, policy)
    model = drawn_models.fresh(recipe, start)
    steps = [object() for _ in COMPILED]
    for name, step in zip(COMPILED, steps, strict=True):
        setattr(model, name, step)
    before = everything(model, recipe)
    dry = mp.convert(model, policy, rules=rules, dry_run=True)
    assert everything(model, recipe) == before
    assert [getattr(model, name) for name in COMPILED] == steps
    first = mp.convert(model, policy, rules=rules)
    once = everything(model, recipe)
    assert said(first) == said(dry)
    assert first.layer_policies == dry.layer_policies
    assert once["weights"] == before["weights"]
    assert {v.dtype for v in model.trainable_variables} <= {"float32"}
    assert [getattr(model, name) for name in COMPILED] == [None] * 3
    for report in (first, dry):
        check_rows(report, model)
    second = mp.convert(model, policy, rules=rules)
    assert everything(model, recipe) == once
    assert second.layer_policies == first.layer_policies
    assert all(row.before == row.after for row in second.rows)
    second.restore()
    assert everything(model, recipe) == once
    first.restore()
    assert everything(model, recipe) == before


@pytest.mark.full
@DRAWN
@given(recipes(overrides=False).filter(built_alike), POLICY, POLICY)
@example(HOLDING, "float32", "mixed_bfloat16")
def test_a_converted_model_equals_one_built_under_the_policy(recipe, start, policy):
    check_against_building(recipe, start, policy)


@full_on("jax")
@QUICK
def test_a_converted_model_equals_one_built_under_the_policy_for_a_few_models(recipe):
    check_against_building(recipe, "float32", "mixed_bfloat16")


def check_against_building(recipe, start, policy):
    # A Sequential without `Input` gives its input the compute dtype of its first layer, which
    # rounds the data; in a conversion the data's dtype decides.
    start = "float32" if recipe.shape == "deferred" else feasible(recipe, start)
    policy = feasible(recipe, policy)
    built, model = drawn_models.fresh(recipe, policy), drawn_models.fresh(recipe, start)
    mp.convert(model, policy, rules=None)
    same_model(model, built, recipe)
    mp.convert(model, "float32")
    assert {name for _, name in policies(model)} == {"float32"}
    same_model(model, drawn_models.fresh(recipe), recipe)


WITH_SHAPES = ["functional", "sequential", "subclassed"]


# A Sequential without an input shape has no masks yet, so pooling that may be masked is float32.
# A conversion of the built model sees which of them are masked.
@pytest.mark.full
@DRAWN
@given(recipes(overrides=False, shapes=WITH_SHAPES).filter(built_alike), POLICY)
def test_a_converted_model_equals_one_built_under_the_rules(recipe, policy):
    policy = mp.Policy(feasible(recipe, policy), rules="safe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.errors.PolicyWarning)  # nested models are stock ones
        with mp.policy_scope(policy):
            built = drawn_models.fresh(recipe, None, ours=True)
    model = drawn_models.fresh(recipe)
    mp.convert(model, policy)
    same_model(model, built, recipe)


def same_model(model, other, recipe):
    assert policies(model) == policies(other)
    assert recipe.shape == "deferred" or symbols(model) == symbols(other)
    assert weights(model) == weights(other)
    assert drawn_models.outputs(model, recipe) == drawn_models.outputs(other, recipe)


def compiled(recipe, policy="float32"):
    model = drawn_models.fresh(recipe, policy)
    model.compile("adam", "mse", run_eagerly=not JAX)
    return model


@pytest.mark.full
@DRAWN
@given(recipes(), HALF, RULES, st.integers(0, 500))
@example(HOLDING, "mixed_bfloat16", "safe", 150)
def test_an_interrupted_conversion_changes_nothing(recipe, policy, rules, number):
    check_interrupted(recipe, policy, rules, number)


@full_on("jax")
@QUICK
def test_an_interrupted_conversion_changes_nothing_for_a_few_models(recipe):
    for number in (60, 120, 180):
        assert check_interrupted(recipe, "mixed_bfloat16", "safe", number)


def check_interrupted(recipe, policy, rules, number):
    """Return whether the conversion made enough calls to be interrupted."""
    model = compiled(recipe)
    before = everything(model, recipe)
    reports = []

    def convert():
        reports.append(mp.convert(model, feasible(recipe, policy), rules=rules))

    stopped = interrupted(convert, number)
    if not stopped:
        reports[0].restore()
    assert everything(model, recipe) == before
    return stopped


@pytest.mark.full
@DRAWN
@given(recipes(), POLICY, POLICY, RULES)
def test_text_and_files_give_the_same_model(recipe, policy, other, rules):
    check_text_and_files(recipe, policy, other, rules)


@full_on("jax")
@QUICK
def test_text_and_files_give_the_same_model_for_a_few_models(recipe):
    check_text_and_files(recipe, "mixed_bfloat16", "mixed_float16", "safe")


def check_text_and_files(recipe, policy, other, rules):
    policy, other = feasible(recipe, policy), feasible(recipe, other)
    model = drawn_models.fresh(recipe)
    report = mp.convert(model, policy, rules=rules)
    wanted = policies(model), symbols(model), drawn_models.outputs(model, recipe)
    again = drawn_models.fresh(recipe)
    mp.convert(again, mp.LayerPolicies.parse(str(report.layer_policies)))
    assert policies(again) == wanted[0]
    assert symbols(again) == wanted[1]
    assert drawn_models.outputs(again, recipe) == wanted[2]
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model.keras"))
        keras.config.set_dtype_policy(other)
        loaded = keras.models.load_model(Path(folder, "model.keras"))
    assert isinstance(loaded, mp.Model)
    assert policies(loaded) == wanted[0]
    assert weights(loaded) == weights(model)
    assert drawn_models.outputs(loaded, recipe) == wanted[2]


@pytest.mark.full
@settings(DRAWN, max_examples=3 if JAX else 12)
@given(recipes(), HALF)
def test_a_converted_model_trains_in_float32_variables(recipe, policy):
    heads = [head._replace(activation=head.activation or "linear") for head in recipe.heads]
    recipe = recipe._replace(heads=tuple(heads))  # without a Dense there may be no weights
    model = compiled(recipe)
    mp.convert(model, feasible(recipe, policy))
    model.train_on_batch(drawn_models.data(recipe), drawn_models.targets(model, recipe))
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    for variable in model.trainable_variables:
        assert np.isfinite(keras.ops.convert_to_numpy(variable.value)).all(), variable.path
    if model.optimizer.name == "loss_scale_optimizer":
        assert not model.optimizer.last_step_skipped
