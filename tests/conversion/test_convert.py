"""Converting models that are built: in place, weights kept, and back."""

import warnings

import keras
import numpy as np
import pytest
from helpers.converted import sequential
from keras import ops

import kerasmp as mp
from kerasmp.backend.keras_private import flatten_layers

layers = keras.layers
X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")


def functional():
    inputs = keras.Input((6, 4))
    inner = keras.Sequential([keras.Input((6, 4)), layers.Dense(8), layers.LayerNormalization()])
    x = inner(inputs)
    x = layers.MultiHeadAttention(2, 4)(x, x)
    shared = layers.Dense(8, activation="relu")
    x = layers.TimeDistributed(layers.Dense(8))(shared(shared(x)))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.attend = layers.MultiHeadAttention(2, 4)
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(self.attend(inputs, inputs))


def subclassed():
    model = Own()
    model(X)
    return model


MODELS = pytest.mark.parametrize("build", [sequential, functional, subclassed])


@MODELS
def test_weights_are_kept_and_restored_is_as_before(build):
    model = build()
    before, weights = model.predict(X, verbose=0), model.get_weights()
    policies = [layer.dtype_policy for layer in flatten_layers(model)]
    report = mp.convert(model)
    half = model.predict(X, verbose=0)
    assert {v.dtype for v in model.variables if "seed" not in v.path} == {"float32"}
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(half, before)  # the compiled step is a new one
    np.testing.assert_allclose(half.astype("float32"), before, rtol=0.05, atol=0.02)
    assert "float16" in {layer.compute_dtype for layer in flatten_layers(model)}
    report.restore()
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    assert [layer.dtype_policy for layer in flatten_layers(model)] == policies
    mp.convert(model)
    report.restore()  # a second time nothing happens
    assert "float16" in {layer.compute_dtype for layer in flatten_layers(model)}


@pytest.mark.parametrize("build", [sequential, functional])
def test_symbolic_outputs_follow(build):
    model = build()
    # JAX has no fused attention in float16 on a CPU.
    attention = {layers.MultiHeadAttention: "float32"}
    report = mp.convert(model, mp.Policy("mixed_float16", rules=attention), rules=None)
    assert model.outputs[0].dtype == "float16"
    assert model.layers[-2].output.dtype == "float16"
    assert model.inputs[0].dtype == "float32"
    further = keras.Model(model.inputs, layers.Dense(2, dtype="float32")(model.outputs[0]))
    assert further.predict(X, verbose=0).dtype == np.float32
    report.restore()
    assert model.outputs[0].dtype == "float32"
    mp.convert(model)
    assert model.outputs[0].dtype == "float32"  # the head
    assert model.layers[-2].output.dtype == "float16"


def test_test_and_train_steps_follow_too():
    model = sequential()
    model.compile(mp.LossScaleOptimizer(keras.optimizers.SGD(0.0)), "mse")
    y = np.zeros((8, 3), "float32")
    losses = [model.evaluate(X, y, verbose=0)]
    report = mp.convert(model)
    losses.append(model.evaluate(X, y, verbose=0))
    assert losses[0] != losses[1]
    model.fit(X, y, verbose=0)
    assert model.layers[0].compute_dtype == "float16"
    report.restore()
    assert model.train_function is None


def test_nested_models_forget_their_steps_too():
    model = functional()
    inner = next(layer for layer in model.layers if isinstance(layer, keras.Sequential))
    before = inner.predict(X, verbose=0)
    assert before.dtype == np.float32
    mp.convert(model)
    assert inner.predict(X, verbose=0).dtype == np.float16
    assert inner.outputs[0].dtype == "float16"


@pytest.mark.parametrize("given", [True, False])
def test_statistics_of_normalization_are_exact_after_any_way(given):
    mean, variance = [1000.3, 1e-9], [1e6, 1e-8]
    x = np.array([[1001.0, 2e-4], [2000.0, -1e-4]], "float32")
    layer = layers.Normalization(mean=mean, variance=variance) if given else layers.Normalization()
    model = keras.Sequential([keras.Input((2,)), layer, layers.ReLU(), layers.ReLU()])
    if not given:
        layer.adapt(x)
    exact = keras.ops.convert_to_numpy(layer(x))
    with np.errstate(over="ignore"):
        broken = mp.convert(model, rules=None)
        mp.convert(model, rules="safe")
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x)), exact)
        broken.restore()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x)), exact)


def test_parts_of_wrappers_and_of_cells_follow():
    inputs = keras.Input((6, 4))
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(inputs)
    x = layers.RNN([layers.GRUCell(2), layers.SimpleRNNCell(2)])(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    before = keras.ops.convert_to_numpy(model(X[:1]))
    report = mp.convert(model)
    assert {layer.compute_dtype for layer in flatten_layers(model)[1:-1]} == {"float16", "float32"}
    assert all(p.compute_dtype == "float16" for p in flatten_layers(model) if "cell" in p.name)
    half = keras.ops.convert_to_numpy(model(X[:1]))
    np.testing.assert_allclose(half, before, atol=1e-2)
    report.restore()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(X[:1])), before)


def test_a_dry_run_says_the_same_and_does_nothing():
    model = functional()
    before = model.predict(X, verbose=0)
    dry = mp.convert(model, dry_run=True)
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    dry.restore()
    wet = mp.convert(model)
    assert [row[1:] for row in dry.rows] == [row[1:] for row in wet.rows]
    assert {row.after for row in wet.rows} == {"mixed_float16", "float32"}


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


def test_rules_of_the_policy_and_of_the_call_are_put_together():
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


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(mp.errors.PolicyError, match="not built"):
        mp.convert(Own())


def test_weights_of_another_dtype_are_refused_and_nothing_changes():
    model = sequential()
    model.layers[-1].dtype_policy = "float64"
    with pytest.raises(mp.errors.PolicyError, match="weights in float64"):
        mp.convert(model)
    assert model.layers[0].compute_dtype == "float32"


def test_a_layer_that_cannot_be_called_leaves_the_model_as_it_was():
    class Picky(layers.Layer):
        def call(self, inputs):
            if keras.backend.standardize_dtype(inputs.dtype) == "float16":
                raise NotImplementedError("float32 only")
            return inputs

    model = keras.Sequential([keras.Input((4,)), layers.Dense(2), Picky(), layers.ReLU()])
    with pytest.raises(NotImplementedError, match="float32 only"):
        mp.convert(model)
    assert {layer.compute_dtype for layer in flatten_layers(model)} == {"float32"}
    assert model.layers[0].output.dtype == "float32"


def test_our_models_wrap_their_optimizer_by_themselves_and_follow_the_output():
    model = mp.Sequential(sequential().layers)
    model(X)
    model.compile("sgd", "mse")
    report = mp.convert(model, "compute=float16,output=float32", rules=None)
    model.fit(X, np.zeros((8, 3)), verbose=0)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert model.predict(X, verbose=0).dtype == np.float32
    report.restore()
    assert model.predict(X, verbose=0).dtype == np.float32


def test_stock_models_follow_the_output_too():
    model = sequential()
    report = mp.convert(model, "compute=float16,output=float32", rules=None)
    assert model.layers[-1].compute_dtype == "float16"
    assert model.predict(X, verbose=0).dtype == "float32"
    report.restore()
    assert type(model) is keras.Sequential
    assert model.predict(X, verbose=0).dtype == "float32"


def test_restore_puts_the_output_dtype_back_where_no_layer_changed():
    with mp.policy_scope("mixed_float16"):
        model = mp.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    x = np.ones((1, 4), "float32")
    before = keras.backend.standardize_dtype(model(x).dtype)
    report = mp.convert(model, "compute=float16,output=float32", rules=None)
    assert keras.backend.standardize_dtype(model(x).dtype) == "float32"
    report.restore()
    assert keras.backend.standardize_dtype(model(x).dtype) == before == "float16"


def test_what_is_no_model_is_an_error():
    with pytest.raises(mp.errors.ArgumentTypeError, match="a str"):
        mp.convert("mixed_float16")


def norm(x):
    return mp.ops.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("function", [norm, mp.ops.in_float32(lambda x: ops.sum(x, -1))])
def test_ops_in_a_functional_model_follow(function, tmp_path):
    inputs = keras.Input((4,))
    dense = keras.layers.Dense(250, kernel_initializer="ones", dtype="float32")
    model = keras.Model(inputs, function(dense(inputs)))
    x = np.full((1, 4), 30, "float32")  # 250 outputs of 120: the sum of their squares is 3.6e6
    wanted = ops.convert_to_numpy(model(x)).item()
    mp.convert(model, "mixed_float16", rules=None)
    found = model(x)
    assert keras.backend.standardize_dtype(found.dtype) == model.outputs[0].dtype == "float16"
    np.testing.assert_allclose(ops.convert_to_numpy(found).item(), wanted, rtol=1e-3)
    mp.convert(model, "float32")
    assert keras.backend.standardize_dtype(model(x).dtype) == model.outputs[0].dtype == "float32"
    if function is norm:
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (loaded(x), model(x))))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("sequental/dense", "sequential/dense"), ("dens", "sequential/dense"), ("xyz.*", None)],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_matches(pattern, near):
    dense = layers.Dense(2, name="dense")
    model = keras.Sequential([keras.Input((4,)), dense, layers.ReLU()], name="sequential")
    with pytest.raises(mp.errors.PolicyError, match="no layer in the model") as caught:
        mp.convert(model, rules={pattern: "float32"})
    assert repr(pattern) in str(caught.value)
    assert ("such as" in str(caught.value)) is (near is not None)
    assert near is None or repr(near) in str(caught.value)
    assert dense.compute_dtype == "float32"
    assert type(model) is keras.Sequential
    report = mp.convert(model, rules={"sequential/.*": "float32", layers.GRU: "float32"})
    assert "no layer is a GRU, as a rule says" in report.notes


def test_a_tensor_that_a_layer_made_when_it_was_built_is_named():
    class Shifted(layers.Layer):
        def build(self, _):
            self.shift = ops.ones((4,), dtype=self.compute_dtype)

        def call(self, x):
            return x + ops.cast(self.shift, x.dtype)

    model = keras.Sequential([keras.Input((4,)), Shifted(name="shifted"), layers.ReLU()])
    notes = mp.convert(model).notes
    assert len(notes) == 1
    assert "made the tensor `shift` in float32" in notes[0]
    assert not mp.convert(model).notes


def test_clones_and_copies_keep_the_policies(tmp_path):
    model = functional()
    mp.convert(model)
    dtypes = [layer.compute_dtype for layer in flatten_layers(model)]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    copied = type(model).from_config(model.get_config())
    for other in (loaded, copied):
        assert [layer.compute_dtype for layer in flatten_layers(other)] == dtypes


def test_rules_that_the_model_was_made_under_act_no_more():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.errors.PolicyWarning)
        with mp.policy_scope(mp.Policy("mixed_float16", rules="safe")):
            model = mp.Sequential([layers.Dense(8), layers.Dense(3)])
            model.build((None, 4))
    rules = model._rules
    report = mp.convert(model, "mixed_float16", rules=None)
    model(X[:, 0])
    assert [layer.compute_dtype for layer in model.layers] == ["float16"] * 2
    report.restore()
    assert model._rules is rules


def test_layer_policies_leave_nothing_to_rules_and_the_output_as_it_is():
    model = sequential()
    text = mp.convert(model, "compute=float16,output=float32", rules=None).layer_policies
    for arguments in ({"rules": {"nosuch": "float32"}}, {"safe_layers": True}):
        with pytest.raises(mp.errors.PolicyError, match="leave nothing to rules"):
            mp.convert(model, text, **arguments)
    mp.convert(model, text)
    assert model.predict(X, verbose=0).dtype == np.float32


def test_an_input_that_keras_made_in_half_precision_is_named():
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([layers.Dense(4), layers.Dense(2)])
    model(X)
    keras.config.set_dtype_policy("float32")
    notes = mp.convert(model, "float32").notes
    assert model.inputs[0].dtype == "float16"
    assert [note for note in notes if "is float16 and rounds what it is given" in note]
    assert not any("rounds what" in note for note in mp.convert(sequential()).notes)
