"""`safe_layers=True` replaces stock layers: reported, saved, as text, and back."""

import keras
import numpy as np
import pytest
from helpers import converted
from helpers.flattened import flatten_layers
from helpers.marks import few, full_on
from helpers.replaced_layers import assert_state, state, stock_left

import kerasmp as mp

layers = keras.layers
X, Y = converted.X, converted.Y
# On JAX's CPU no float16 attention runs.
POLICY = "mixed_bfloat16" if keras.backend.backend() == "jax" else "mixed_float16"


def kinds(*quick):
    """Return a parametrization over all kinds; the quick set has the named ones."""
    return pytest.mark.parametrize("kind", few(converted.KINDS, quick))


def compiled(kind):
    keras.utils.set_random_seed(0)
    model = converted.KINDS[kind]()
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@kinds("attention")
def test_all_are_replaced_reported_trained_and_restored(kind):
    model = compiled(kind)
    exact, weights = model.predict(X, verbose=0), model.get_weights()
    before, names = state(model), {id(x): type(x).__name__ for x in flatten_layers(model)}
    report = mp.convert(model, POLICY, safe_layers=True)
    assert not stock_left(model)
    replaced = {row.path: row.replaced for row in report.rows if row.replaced}
    assert replaced == {
        row.path: names[id(row.layer)]
        for row in report.rows
        if type(row.layer).__module__.startswith("kerasmp.layers")
    }
    assert len(replaced) >= 2
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(model.predict(X, verbose=0), exact, atol=0.05)
    report.restore()
    assert_state(model, before)
    np.testing.assert_array_equal(model.predict(X, verbose=0), exact)
    mp.convert(model, POLICY, safe_layers=True)
    model.fit(X, Y, verbose=0)
    assert not mp.convert(model, POLICY, safe_layers=True).rows[0].replaced


def test_with_safe_layers_more_of_the_model_is_in_half_precision():
    counts = []
    for safe_layers in (False, True):
        model = converted.attention()
        report = mp.convert(model, POLICY, safe_layers=safe_layers, dry_run=True)
        counts.append(sum(row.after == POLICY for row in report.rows))
        assert type(model.layers[1]) is layers.MultiHeadAttention
    assert counts[0] < counts[1] == len(report.rows)
    assert "MultiHeadAttention (kerasmp)" in str(report)
    assert "DenseHead (kerasmp, was Dense)" in str(report)


@full_on("jax", "oldest")
@kinds("nested")
def test_a_file_brings_them_back_in_another_process(kind, tmp_path, another_process):
    model = compiled(kind)
    mp.convert(model, POLICY, safe_layers=True)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / f"{kind}.keras")
    found = another_process("helpers.converted:load_facts", path=str(tmp_path / f"{kind}.keras"))
    assert found == converted.facts(model)
    assert "kerasmp>" in found["policies"].split("\n", 1)[1]


@kinds("nested")
def test_policies_as_text_replace_the_same_layers_of_another_build(kind):
    model, other = compiled(kind), converted.KINDS[kind]()
    text = str(mp.convert(model, POLICY, safe_layers=True).layer_policies)
    report = mp.convert(other, mp.LayerPolicies.parse(text))
    for said in (type, lambda layer: layer.compute_dtype):
        assert [*map(said, flatten_layers(other))] == [*map(said, flatten_layers(model))]
    assert any(row.replaced for row in report.rows)
    report.restore()
    assert not any("kerasmp" in type(x).__module__ for x in flatten_layers(other))


def test_a_rule_that_fails_leaves_the_layers_stock():
    model = compiled("nested")
    before = state(model)
    with pytest.raises(mp.errors.PolicyError, match="not match any layer path"):
        mp.convert(model, POLICY, safe_layers=True, rules={"nowhere": "float32"})
    assert_state(model, before)


def test_weights_files_of_the_stock_model_load_except_with_a_replaced_head(tmp_path):
    path = tmp_path / "stock.weights.h5"
    model, other = compiled("nested"), converted.nested()
    model.save_weights(path)
    mp.convert(other, POLICY)
    other.load_weights(path)
    for one, wanted in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, wanted)
    mp.convert(other, POLICY, safe_layers=True)
    with pytest.raises(ValueError, match="dense"):
        other.load_weights(path)
