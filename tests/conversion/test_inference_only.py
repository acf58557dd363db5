"""Half-precision variables: half the bytes, no training, saved and loaded, and back."""

import keras
import numpy as np
import pytest
from helpers import converted
from helpers.flattened import flatten_layers
from helpers.marks import few, full, full_on, marks_on

import kerasmp as mp

pytestmark = marks_on("jax")

layers = keras.layers
X, Y = converted.X, converted.Y


def compiled(kind="nested"):
    """Return a compiled model with trained weights; no step is traced, which takes a second."""
    keras.utils.set_random_seed(0)
    model = getattr(converted, kind)()
    model.compile("adam", "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(1)
    # Statistics and biases too: no number is a short binary fraction.
    model.set_weights([w + rng.uniform(0.01, 0.1, w.shape) for w in model.get_weights()])
    return model


def predict(model):
    return np.asarray(model.predict(X, verbose=0), "float32")


def dtypes(model):
    return [v.dtype for v in model.variables if "seed" not in v.path]


@pytest.mark.parametrize(
    ("kind", "half", "given"),
    [
        ("sequential", "float16", "mixed_"),
        full("recurrent", "float16", ""),
        full("recurrent", "bfloat16", "mixed_"),
    ],
)
def test_without_rules_all_variables_are_in_half_precision(kind, half, given):
    model = compiled(kind)
    exact, optimizer = predict(model), model.optimizer
    before = 4 * sum(int(np.prod(v.shape)) for v in model.weights)
    report = mp.convert(model, given + half, rules=None, variables=half)
    assert set(dtypes(model)) == {half}
    assert {row.after for row in report.rows} == {half}
    assert f"take {before // 2:,} bytes, not {before:,}; rounding" in str(report)
    assert "variables in half precision: the model refuses to be trained" in report.notes
    assert any("the optimizer Adam is removed" in note for note in report.notes)
    assert not any("LossScaleOptimizer" in note for note in report.notes)
    np.testing.assert_allclose(predict(model), exact, atol=0.05)
    assert model.evaluate(X, Y, verbose=0)[0] > 0
    assert model.optimizer is None
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(mp.errors.PolicyError, match="inference only"):
            train(X, Y)
    report.restore()
    assert set(dtypes(model)) == {"float32"}
    np.testing.assert_array_equal(predict(model), exact)
    assert model.optimizer is optimizer
    model.fit(X, Y, verbose=0)


# On JAX's CPU no float16 attention runs.
@pytest.mark.parametrize("kind", ["nested", full("recurrent")])
def test_layers_that_the_safe_rules_keep_in_float32_keep_their_variables(kind):
    model = compiled(kind)
    report = mp.convert(model, "float16", variables="float16")
    kept = [row for row in report.rows if row.after == "float32"]
    assert kept
    # Variables of a wrapper that its inner layer has made belong to the inner layer.
    for row in report.rows:
        if not flatten_layers(row.layer)[1:]:
            wanted = keras.dtype_policies.get(row.after).variable_dtype
            assert {v.dtype for v in row.layer.weights} <= {wanted}
    assert set(dtypes(model)) == {"float16", "float32"}
    assert np.isfinite(predict(model)).all()


FILES = [(kind, safe) for kind in converted.KINDS for safe in (False, True)]


@full_on("torch")
@pytest.mark.parametrize(("kind", "safe_layers"), few(FILES, [("nested", True)]))
def test_a_file_gives_the_same_model_in_another_process(
    kind, safe_layers, tmp_path, another_process
):
    model = compiled(kind)
    mp.convert(model, "bfloat16", variables="bfloat16", safe_layers=safe_layers)
    model.save(tmp_path / "model.keras")
    found = another_process("helpers.converted:load_one", path=str(tmp_path / "model.keras"))
    assert found == converted.predictions(model)
    assert "inference only" in found["error"]


@pytest.mark.parametrize("policy", [full("float32"), "mixed_float16"])
def test_a_policy_over_float32_variables_widens_them_again(policy):
    model = compiled()
    exact = predict(model)
    mp.convert(model, "float16", variables="float16")
    report = mp.convert(model, policy)
    assert set(dtypes(model)) == {"float32"}
    assert any("float32 again" in note for note in report.notes)
    error = np.abs(predict(model) - exact).max()
    assert 0 < error < 0.05  # rounding is not undone
    model.compile(mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=1.0), "mse")
    before = model.get_weights()
    model.fit(X, Y, verbose=0)
    trained = model.get_weights()
    assert any((one != other).any() for one, other in zip(trained, before, strict=True))
    report.restore()
    assert "float16" in dtypes(model)
    for now, then in zip(model.get_weights(), trained, strict=True):
        np.testing.assert_array_equal(now, then.astype(now.dtype))  # restore keeps training
    with pytest.raises(mp.errors.PolicyError, match="inference only"):
        model.fit(X, Y)


def test_a_model_with_half_precision_variables_refuses_to_train():
    model = compiled()
    mp.convert(model, "float16", variables="float16", rules=None)
    report = mp.convert(model, "float16", variables="float16")  # the head is float32 again
    assert set(dtypes(model)) == {"float16", "float32"}
    assert any("refuses to be trained" in note for note in report.notes)
    model.compile("sgd", "mse")
    with pytest.raises(mp.errors.PolicyError, match="inference only"):
        model.fit(X, Y)


def test_nested_models_refuse_to_train_also_after_loading(tmp_path):
    inner = converted.nested()
    mp.convert(inner)
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, layers.Dense(3)(inner(inputs)))
    mp.convert(model, "float16", variables="float16")
    inner.compile("sgd", "mse")
    with pytest.raises(mp.errors.PolicyError, match="inference only"):
        inner.fit(X, Y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert dtypes(loaded) == dtypes(model)
    np.testing.assert_array_equal(predict(loaded), predict(model))


def test_layers_that_ask_for_float32_variables_get_half_precision_ones(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), Asking(), layers.Flatten(), layers.Dense(3)])
    mp.convert(model, "float16", variables="float16", rules=None)
    assert set(dtypes(model)) == {"float16"}
    model.save(tmp_path / "model.keras")
    assert set(dtypes(keras.models.load_model(tmp_path / "model.keras"))) == {"float16"}


@keras.saving.register_keras_serializable("inference_only")
class Asking(layers.Layer):
    """A user-defined layer that sets the dtype of its weight."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), dtype="float32")

    def call(self, x):
        return x * self.scale


def test_an_lstm_converted_back_to_float32_is_saved_for_stock_keras(tmp_path):
    # JAX compiles the loop of an LSTM, so the loaded model is compared without a call.
    model = keras.Sequential([keras.Input((6, 4)), layers.LSTM(2), layers.Dense(3)])
    mp.convert(model, "float16", variables="float16")
    assert "kerasmp>Orthogonal" in str(keras.saving.serialize_keras_object(model))
    mp.convert(model, "float32")
    mp.save_for_stock_keras(model, tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is keras.Sequential
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_optimizer_compiled_after_the_conversion_stays():
    model = compiled()
    report = mp.convert(model, "float16", variables="float16")
    model.compile("sgd", "mse")
    optimizer = model.optimizer
    report.restore()
    assert model.optimizer is optimizer
    model.fit(X, Y, verbose=0)


def test_invalid_arguments_are_refused_and_nothing_changes():
    model = compiled()
    before, weights = str(mp.LayerPolicies.of(model)), model.get_weights()
    model.layers[-1].kernel.assign(model.layers[-1].kernel + 1e6)
    calls = [
        ({"policy": "float16"}, 'call convert.* variables="float16"'),
        ({"policy": "float16", "rules": None}, 'argument such as variables="float16"'),
        ({"policy": "float16", "variables": "float32"}, "float32 variables"),
        ({"policy": "mixed_bfloat16", "variables": "float16"}, "No layer computes in float16"),
        ({"variables": "int8"}, "variables='int8'.*'float16', 'bfloat16', 'float32' or None"),
        ({"variables": np.ones(2)}, "Variables cannot have this dtype"),
        ({"policy": "float16", "variables": "float16", "rules": None}, "would become inf"),
    ]
    for arguments, said in calls:
        with pytest.raises(mp.errors.PolicyError, match=said):
            mp.convert(model, **arguments)
        assert str(mp.LayerPolicies.of(model)) == before
        assert set(dtypes(model)) == {"float32"}
        assert type(model) is keras.Sequential
        assert isinstance(model.optimizer, keras.optimizers.Adam)
    np.testing.assert_array_equal(model.get_weights()[0], weights[0])


def test_a_dry_run_changes_no_variable():
    model = compiled()
    values = [v.value for v in model.variables]
    dry = mp.convert(model, "float16", variables="float16", dry_run=True)
    assert any("bytes, not" in note for note in dry.notes)
    assert all(v.value is old for v, old in zip(model.variables, values, strict=True))
    model.fit(X, Y, verbose=0)


def test_user_rules_hold_for_variables_too():
    model = compiled()
    mp.convert(model, "float16", variables="float16", rules={model.layers[-1].path: "float32"})
    assert {v.dtype for v in model.layers[-1].weights} == {"float32"}
    assert {v.dtype for v in model.layers[0].weights} == {"float16"}
    text = mp.LayerPolicies.of(model)
    other = compiled()
    with pytest.raises(mp.errors.PolicyError, match="argument such as"):
        mp.convert(other, text)
    mp.convert(other, text, variables="float16")
    assert str(mp.LayerPolicies.of(other)).split()[2::3] == str(text).split()[2::3]
    assert dtypes(other) == dtypes(model)
