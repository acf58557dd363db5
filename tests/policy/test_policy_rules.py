"""Rules: exceptions to a policy, by layer path and by layer class."""

import copy
import pickle

import keras
import numpy as np
import pytest

from kerasmp.errors import ArgumentTypeError, PolicyError
from kerasmp.policy import Policy, policy_scope

MAP = keras.dtype_policies.DTypePolicyMap
RULES = {"head/.*": "float32", keras.layers.Softmax: keras.DTypePolicy("float32"), "a": "bfloat16"}


@keras.saving.register_keras_serializable(package="policy_tests")
class Registered(keras.layers.Layer):
    pass


class Unregistered(keras.layers.Layer):
    pass


class Dense(keras.layers.Layer):
    """Another class with the name of a Keras layer."""


@pytest.mark.unit
def test_rules_read_back_as_a_read_only_mapping():
    policy = Policy("mixed_float16", rules=RULES)
    assert dict(policy.rules) == {
        "a": Policy("bfloat16"),
        "head/.*": Policy("float32"),
        keras.layers.Softmax: Policy("float32"),
    }
    with pytest.raises(TypeError, match="does not support item assignment"):
        policy.rules["b"] = Policy("float32")


@pytest.mark.unit
def test_rules_compare_by_content_whatever_their_order():
    backwards = dict(reversed(RULES.items()))
    policy = Policy("mixed_float16", rules=RULES)
    assert policy == Policy("mixed_float16", rules=backwards)
    assert hash(policy) == hash(Policy("mixed_float16", rules=backwards))
    assert policy != Policy("mixed_float16")
    assert policy != Policy("mixed_float16", rules={**RULES, "a": "float32"})
    assert Policy("float32", rules={}) == Policy("float32", rules=None) == Policy("float32")


@pytest.mark.unit
def test_the_users_dict_is_not_shared():
    rules = dict(RULES)
    policy = Policy("mixed_float16", rules=rules)
    rules.clear()
    assert policy == Policy("mixed_float16", rules=RULES)


@pytest.mark.unit
def test_rules_of_a_policy_are_kept_or_replaced():
    policy = Policy("mixed_float16", rules=RULES)
    assert Policy(policy) == policy
    assert Policy(policy, rules={"b": "float32"}) == Policy("mixed_float16", rules={"b": "float32"})
    assert Policy(policy, rules={}) == Policy("mixed_float16")


@pytest.mark.unit
def test_rules_survive_pickle_copy_and_config():
    policy = Policy("mixed_float16", rules={**RULES, Registered: "float32"})
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert copy.deepcopy(policy) == policy
    assert policy.get_config() == {
        "spec": "mixed_float16",
        "rules": [
            {"path": "a", "policy": "bfloat16"},
            {"path": "head/.*", "policy": "float32"},
            {"layer": "Softmax", "policy": "float32"},
            {"layer": "policy_tests>Registered", "policy": "float32"},
        ],
    }
    assert Policy.from_config(policy.get_config()) == policy


@pytest.mark.unit
def test_repr_shows_the_rules():
    policy = Policy("mixed_float16", rules={"head": "float32"})
    assert repr(policy) == "Policy('mixed_float16', rules={'head': Policy('float32')})"
    assert str(policy) == "mixed_float16"


@pytest.mark.unit
def test_patterns_lower_to_a_map_with_an_explicit_default():
    policy = Policy("mixed_float16", rules=RULES)
    lowered = policy.to_keras()
    assert isinstance(lowered, MAP)
    with policy_scope("bfloat16"):  # a default of None would follow this
        assert lowered.default_policy == keras.DTypePolicy("mixed_float16")
    assert {path: lowered[path].name for path in ("a", "head/x", "body")} == {
        "a": "bfloat16",
        "head/x": "float32",
        "body": "mixed_float16",
    }


def test_a_lowered_map_keeps_its_names_through_keras_serialization():
    lowered = Policy("mixed_float16", rules=RULES).to_keras()
    stored = keras.dtype_policies.serialize(lowered)
    loaded = keras.dtype_policies.deserialize(stored)
    assert {path: item.name for path, item in loaded.items()} == {
        "a": "bfloat16",
        "head/.*": "float32",
    }
    assert Policy(loaded) == Policy(lowered)


@pytest.mark.unit
def test_class_rules_alone_lower_to_a_plain_policy():
    lowered = Policy("mixed_float16", rules={keras.layers.Softmax: "float32"}).to_keras()
    assert lowered == keras.DTypePolicy("mixed_float16")


def test_stock_layers_follow_path_rules():
    with policy_scope(Policy("mixed_bfloat16", rules={"head": "float32", "body/inner": "float32"})):
        inputs = keras.Input((4,))
        inner = keras.layers.Dense(4, name="inner")
        body = keras.Sequential([inner, keras.layers.Dense(4, name="outer")], name="body")
        outputs = keras.layers.Dense(2, name="head")(body(inputs))
        model = keras.Model(inputs, outputs)
    assert outputs.dtype == "float32"
    assert model.get_layer("head").compute_dtype == "float32"
    assert [layer.compute_dtype for layer in body.layers] == ["float32", "bfloat16"]
    assert {variable.dtype for variable in model.variables} == {"float32"}
    assert keras.ops.shape(model(np.ones((3, 4), "float32"))) == (3, 2)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["head"], r"Unknown rule set\. Received: 'head'\."),
        ([{"a": "float32"}, {"a": "bfloat16"}], r"Two rules.*same key.*'a': 'bfloat16'"),
        ("saef", r"Unknown rule set\. Received: 'saef'\..*Did you mean \"safe\"\?"),
        ({"head/(": "float32"}, r"not a regular expression\. Received: 'head/\('.*Python says"),
        ({"head": "flaot32"}, r'Unknown policy name.*Did you mean "float32"\?'),
        (
            {"head": "output=float32"},
            r"cannot have an output or rules of its own.*'head': 'output=float32'",
        ),
        ({"head": Policy("float32", rules={"a": "float16"})}, r"output or rules of its own"),
        ({"head": Policy("mixed_float16", rules="safe")}, r"output or rules of its own"),
    ],
)
def test_rules_with_bad_values_are_refused(rules, message):
    with pytest.raises(PolicyError, match=message):
        Policy("mixed_float16", rules=rules)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([3], r"rules is not a mapping\. Received: 3\. Expected: a dict"),
        ({3: "float32"}, r"neither a layer path pattern nor a layer class\. Received: 3"),
        ({int: "float32"}, r"neither a layer path pattern nor a layer class.*'int'"),
        (
            {"head": None},
            r"A policy cannot be created from this value\. Received: None of type NoneType",
        ),
    ],
)
def test_rules_of_the_wrong_type_are_refused(rules, message):
    with pytest.raises(ArgumentTypeError, match=message):
        Policy("mixed_float16", rules=rules)


@pytest.mark.unit
@pytest.mark.parametrize("cls", [Unregistered, Dense])
def test_a_class_that_a_file_could_not_name_is_refused_on_saving(cls):
    policy = Policy("mixed_float16", rules={cls: "float32"})
    with pytest.raises(
        PolicyError, match=r"cannot be found by its name.*register_keras_serializable"
    ):
        policy.get_config()


@pytest.mark.unit
@pytest.mark.parametrize("name", ["gone>Layer", "os.system", "deserialize"])
def test_a_class_that_is_not_known_here_is_refused_on_loading(name):
    config = {"spec": "float32", "rules": [{"layer": name, "policy": "float16"}]}
    with pytest.raises(PolicyError, match=r"not known in this process.*Import the module"):
        Policy.from_config(config)
