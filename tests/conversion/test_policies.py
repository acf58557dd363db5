"""Which policy each layer gets, what the report says, and what is refused."""

import warnings

import keras
import numpy as np
import pytest
from helpers import converted
from helpers.converted import functional, sequential
from helpers.flattened import flatten_layers
from keras import ops

import kerasmp as mp

pytestmark = pytest.mark.unit
layers = keras.layers
X = converted.X


def predict(model):
    return keras.ops.convert_to_numpy(model(X))


@pytest.mark.parametrize("build", [sequential, functional])
def test_symbolic_outputs_follow(build):
    model = build()
    report = mp.convert(model, rules=None)
    assert model.outputs[0].dtype == "float16"
    assert model.layers[-2].output.dtype == "float16"
    assert model.inputs[0].dtype == "float32"
    further = keras.Model(model.inputs, layers.Dense(2, dtype="float32")(model.outputs[0]))
    assert predict(further).dtype == np.float32
    report.restore()
    assert model.outputs[0].dtype == "float32"
    mp.convert(model)
    assert model.outputs[0].dtype == "float32"  # the head
    assert model.layers[-2].output.dtype == "float16"


def test_the_report_names_the_exceptions_and_their_reasons():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.Softmax(name="soft"), layers.Dense(2)]
    )
    text = str(mp.convert(model, dry_run=True))
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith(f"{model.name}: 2 float32, 1 mixed_float16; 1 changed")
    assert ["layer", "class", "before", "after", "why"] in lines
    (soft,) = [line for line in lines if line[:1] == ["soft"]]
    assert soft[1:4] == ["Softmax", "float32", "float32"]
    assert soft[-5:] == ["(hazards", "3,", "14,", "18,", "19)"]


def test_rules_of_the_policy_and_of_the_call_are_combined():
    model = functional()
    policy = mp.Policy("mixed_float16", rules={layers.LayerNormalization: "float32"})
    report = mp.convert(model, policy)
    assert report.policy.safe
    assert report.policy.rules == policy.rules
    report.restore()
    assert not mp.convert(model, policy, rules=None, dry_run=True).policy.safe
    safe = mp.Policy(policy, rules=["safe", policy.rules])
    assert mp.convert(model, safe, rules=None, dry_run=True).policy == safe
    both = mp.convert(model, policy, rules=["safe", {layers.Dense: "float32"}], dry_run=True)
    assert set(both.policy.rules) == {layers.Dense, layers.LayerNormalization}


def test_a_shared_policy_map_is_not_written_into():
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    keras.config.set_dtype_policy(policies)
    model = sequential()
    report = mp.convert(model)
    assert model.layers[0].compute_dtype == "float16"
    assert keras.layers.Dense(2).compute_dtype == "float32"
    assert not list(policies.items())
    report.restore()
    assert not list(policies.items())
    assert isinstance(model.layers[0].dtype_policy, keras.dtype_policies.DTypePolicyMap)


def test_weights_of_another_dtype_are_refused_and_nothing_changes():
    model = sequential()
    model.layers[-1].dtype_policy = "float64"
    with pytest.raises(mp.errors.PolicyError, match="float64 weights"):
        mp.convert(model)
    assert model.layers[0].compute_dtype == "float32"


class Picky(layers.Layer):
    def call(self, inputs):
        if keras.backend.standardize_dtype(inputs.dtype) == "float16":
            raise NotImplementedError("float32 only\nand more")
        return inputs


@pytest.mark.parametrize("rules", [None, "safe"])
def test_a_layer_that_cannot_be_called_stays_in_float32_with_the_reason(rules):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2), Picky(), layers.ReLU()])
    report = mp.convert(model, rules=rules)
    assert [layer.compute_dtype for layer in model.layers[:2]] == ["float16", "float32"]
    (row,) = [row for row in report.rows if row.layer is model.layers[1]]
    assert row.reason == "cannot compute in float16: NotImplementedError: float32 only"
    report.restore()
    assert {layer.compute_dtype for layer in flatten_layers(model)} == {"float32"}
    assert model.layers[0].output.dtype == "float32"


def test_a_half_precision_rule_for_a_layer_that_cannot_be_called_is_refused():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(2), Picky(name="picky"), layers.ReLU()]
    )
    with pytest.raises(mp.errors.PolicyError, match=r"picky\", by your rule .*float32 only"):
        mp.convert(model, rules={Picky: "mixed_float16"})
    assert {layer.compute_dtype for layer in flatten_layers(model)} == {"float32"}
    assert model.layers[0].output.dtype == "float32"


def test_stock_models_follow_the_output_dtype_too():
    model = sequential()
    report = mp.convert(model, "compute=float16,output=float32", rules=None)
    assert model.layers[-1].compute_dtype == "float16"
    assert predict(model).dtype == "float32"
    report.restore()
    assert type(model) is keras.Sequential
    assert predict(model).dtype == "float32"


def test_restore_puts_the_output_dtype_back_where_no_layer_changed():
    with mp.policy_scope("mixed_float16"):
        model = mp.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    x = np.ones((1, 4), "float32")
    before = keras.backend.standardize_dtype(model(x).dtype)
    report = mp.convert(model, "compute=float16,output=float32", rules=None)
    assert keras.backend.standardize_dtype(model(x).dtype) == "float32"
    report.restore()
    assert keras.backend.standardize_dtype(model(x).dtype) == before == "float16"


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("sequental/dense", "sequential/dense"), ("dens", "sequential/dense"), ("xyz.*", None)],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_matches(pattern, near):
    dense = layers.Dense(2, name="dense")
    model = keras.Sequential([keras.Input((4,)), dense, layers.ReLU()], name="sequential")
    with pytest.raises(mp.errors.PolicyError, match="not match any layer path") as caught:
        mp.convert(model, rules={pattern: "float32"})
    assert repr(pattern) in str(caught.value)
    assert ("such as" in str(caught.value)) is (near is not None)
    assert near is None or repr(near) in str(caught.value)
    assert dense.compute_dtype == "float32"
    assert type(model) is keras.Sequential
    report = mp.convert(model, rules={"sequential/.*": "float32", layers.GRU: "float32"})
    assert "no layer is a GRU, which a rule names" in report.notes


def test_a_tensor_that_a_layer_made_when_it_was_built_is_named():
    class Shifted(layers.Layer):
        def build(self, _):
            self.shift = ops.ones((4,), dtype=self.compute_dtype)

        def call(self, x):
            return x + ops.cast(self.shift, x.dtype)

    model = keras.Sequential([keras.Input((4,)), Shifted(name="shifted"), layers.ReLU()])
    notes = mp.convert(model).notes
    assert len(notes) == 1
    assert "created the tensor `shift` in float32" in notes[0]
    assert not mp.convert(model).notes


def test_rules_that_the_model_was_made_under_no_longer_apply():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.errors.PolicyWarning)
        with mp.policy_scope(mp.Policy("mixed_float16", rules="safe")):
            model = mp.Sequential([layers.Dense(8), layers.Dense(3)])
            model.build((None, 4))
    report = mp.convert(model, "mixed_float16", rules=None)
    model(X[:, 0])
    assert [layer.compute_dtype for layer in model.layers] == ["float16"] * 2
    report.restore()
    model(X[:, 0])  # they apply again
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "float32"]


def test_layer_policies_override_rules_and_leave_the_output_dtype_alone():
    model = sequential()
    text = mp.convert(model, "compute=float16,output=float32", rules=None).layer_policies
    for arguments in ({"rules": {"nosuch": "float32"}}, {"safe_layers": True}):
        with pytest.raises(mp.errors.PolicyError, match="leave nothing to rules"):
            mp.convert(model, text, **arguments)
    mp.convert(model, text)
    assert predict(model).dtype == np.float32


def test_an_input_that_keras_made_in_half_precision_is_named():
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([layers.Dense(4), layers.Dense(2)])
    model(X)
    keras.config.set_dtype_policy("float32")
    notes = mp.convert(model, "float32").notes
    assert model.inputs[0].dtype == "float16"
    assert [note for note in notes if "is float16 and rounds the data" in note]
    assert not any("rounds what" in note for note in mp.convert(sequential()).notes)
