"""Which rule decides for a layer, and rules that disagree."""

import keras
import numpy as np
import pytest

import kerasmp as mp
from kerasmp.policy.assign import assign

layers = keras.layers


def model_of_two():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(2, name="body"),
            layers.Softmax(name="soft"),
            layers.ReLU(name="last"),
        ]
    )


def after(rules, model=None):
    policy = mp.Policy("mixed_float16", rules=rules)
    rows = assign(model or model_of_two(), policy)[1:]
    return {row.path.rpartition("/")[2]: (row.after, row.reason) for row in rows}


@pytest.mark.unit
def test_assigning_changes_nothing():
    model = model_of_two()
    rows = assign(model, mp.Policy("mixed_float16", rules="safe"))
    assert {row.before for row in rows} == {"float32"}
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    assert rows[0].layer is model
    assert [row.layer for row in rows[1:]] == model.layers


@pytest.mark.unit
def test_the_users_rules_win_over_the_safe_ones():
    assert after("safe")["soft"][0] == "float32"
    by_class = after(["safe", {layers.Softmax: "mixed_float16"}])
    assert by_class["soft"] == ("mixed_float16", "your rule for the class Softmax")
    by_path = after(["safe", {".*soft": "mixed_bfloat16"}])
    assert by_path["soft"] == ("mixed_bfloat16", 'your rule ".*soft"')
    assert by_path["last"][0] == "float32"


@pytest.mark.unit
def test_a_pattern_must_match_the_whole_path():
    assert after({"oft": "float32", "so": "float32"})["soft"][0] == "mixed_float16"


@pytest.mark.unit
def test_two_rules_with_different_answers_are_an_error_that_names_both():
    rules = {".*soft": "mixed_bfloat16", layers.Softmax: "float32"}
    with pytest.raises(mp.errors.PolicyError) as caught:
        after(rules)
    for part in ('"soft"', 'your rule ".*soft"', "the class Softmax", "bfloat16", "'float32'"):
        assert part in str(caught.value)
    with pytest.raises(mp.errors.PolicyError, match="different policies for the layer"):
        after({".*soft": "float32", ".*so.*": "float16"})


@pytest.mark.unit
def test_rules_that_agree_and_exact_paths_are_no_error():
    assert after({".*soft": "float32", layers.Softmax: "float32"})["soft"][0] == "float32"
    model = model_of_two()
    path = model.get_layer("body").path
    exact = after({path: "float32", ".*body": "mixed_bfloat16"}, model)
    assert exact["body"] == ("float32", f'your rule "{path}"')


@pytest.mark.unit
def test_a_class_rule_covers_what_is_inside_up_to_the_next_rule():
    inputs = keras.Input((4, 8))
    outputs = layers.MultiHeadAttention(1, 8, name="mha")(inputs, inputs)
    model = keras.Model(inputs, layers.ReLU()(outputs))
    inside = {"mha", "query", "key", "value", "attention_output"}
    got = after(["safe", {layers.MultiHeadAttention: "mixed_float16"}], model)
    assert {name for name in inside if got[name][0] == "mixed_float16"} == inside
    got = after({layers.MultiHeadAttention: "float32", "mha/key": "mixed_float16"}, model)
    assert {name for name in inside if got[name][0] == "float32"} == inside - {"key"}
    # As in Keras, a path names only the layer.
    got = after({"mha": "float32"}, model)
    assert {name for name in inside if got[name][0] == "float32"} == {"mha"}


@pytest.mark.unit
def test_parts_without_their_own_path_can_be_named():
    inputs = keras.Input((4, 8))
    outputs = layers.MultiHeadAttention(1, 8, name="mha")(inputs, inputs)
    model = keras.Model(inputs, layers.ReLU()(outputs))
    got = after({"mha/softmax.*": "float32"}, model)
    assert [name for name, (policy, _) in got.items() if policy == "float32"] == [
        name for name in got if name.startswith("softmax")
    ]


def test_layers_that_do_not_compute_in_floats_or_set_their_own_dtype_are_kept():
    fixed = mp.layers.WithDtype(keras.Sequential([layers.Dense(2, name="inner")]), "float32")
    model = keras.Sequential([keras.Input((4,)), fixed, layers.ReLU(), layers.ReLU()])
    model.layers[1].dtype_policy = "int32"
    got = after("safe", model)
    assert got["inner"][0] == "float32"
    assert "WithDtype" in got["inner"][1]
    assert got[model.layers[1].name] == ("int32", "kept: it computes in int32")


@pytest.mark.unit
def test_quantized_layers_are_kept():
    model = model_of_two()
    model.get_layer("body").quantize("int8")
    assert after("safe", model)["body"] == ("int8_from_float32", "kept: it is quantized")


@pytest.mark.unit
def test_shared_layers_have_one_row():
    inputs = keras.Input((4,))
    dense = layers.Dense(4)
    model = keras.Model(inputs, layers.ReLU()(dense(dense(inputs))))
    rows = assign(model, mp.Policy("mixed_float16"))
    assert sum(row.layer is dense for row in rows) == 1


@pytest.mark.unit
def test_a_policy_with_the_safe_rules_reads_back():
    policy = mp.Policy("mixed_float16", rules=["safe", {"a": "float32"}])
    assert policy.safe
    assert dict(policy.rules) == {"a": mp.Policy("float32")}
    assert repr(policy) == "Policy('mixed_float16', rules=['safe', {'a': Policy('float32')}])"
    assert repr(mp.Policy("mixed_float16", rules="safe")) == "Policy('mixed_float16', rules='safe')"
    assert policy.get_config()["rules"] == [{"set": "safe"}, {"path": "a", "policy": "float32"}]
    assert mp.Policy.from_config(policy.get_config()) == policy
    assert mp.Policy(policy) == policy
    assert mp.Policy(policy, rules={"a": "float32"}) != policy
    assert 'the rule set "safe"' in policy.beyond_keras
    assert policy != mp.Policy("mixed_float16", rules={"a": "float32"})
    assert np.unique([hash(policy), hash(mp.Policy(policy))]).size == 1
