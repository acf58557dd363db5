"""Models without `call` are converted by their parts, and unbuilt ones with a sample."""

import keras
import numpy as np
import pytest
from helpers.converted import Net, X
from helpers.flattened import flatten_layers

import kerasmp as mp

layers = keras.layers


def part(units, **settings):
    return keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(units)], **settings)


class Gan(keras.Model):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.generator, self.critics = part(4, name="generator"), [part(1, name="critic")]
        self.late = keras.Sequential([layers.Dense(2)], name="late")


@pytest.mark.parametrize("built", [True, False])
def test_built_parts_are_converted_and_the_rest_is_named(built):
    model = Gan()
    model.built = built  # as in Keras's guide
    before = [layer.dtype_policy for layer in flatten_layers(model)]
    report = mp.convert(model, sample=X)
    for inner in (model.generator, *model.critics):
        assert [layer.compute_dtype for layer in inner.layers] == ["float16", "float32"]
        assert inner.outputs[0].dtype == "float32"  # a loss of its train step sees it
    assert model.late.layers[0].compute_dtype == "float32"
    assert {"generator", "critic"} < {row.path for row in report.rows}
    assert "late" not in str([row.path for row in report.rows])
    assert any(note.startswith('"late" is not built') for note in report.notes)
    assert "the sample was not used: the model has no call" in report.notes
    assert isinstance(model, mp.Model)
    report.restore()
    assert [layer.dtype_policy for layer in flatten_layers(model)] == before
    assert type(model) is Gan


def test_layers_of_an_unbuilt_part_are_not_replaced():
    model = Gan()
    report = mp.convert(model, safe_layers=True)
    assert type(model.late.layers[0]) is layers.Dense
    assert type(model.generator.layers[0]) is mp.layers.Dense
    report.restore()
    mp.convert(model, report.layer_policies)
    assert type(model.late.layers[0]) is layers.Dense
    assert type(model.generator.layers[0]) is mp.layers.Dense


def test_a_model_without_any_built_part_is_an_error():
    class Later(keras.Model):
        def __init__(self):
            super().__init__()
            self.late = keras.Sequential([layers.Dense(2)])

    model = Later()
    with pytest.raises(mp.errors.PolicyError, match=r"none of its parts is built.*Call its parts"):
        mp.convert(model)


def test_a_sample_builds_the_model():
    model = Net()
    with pytest.raises(mp.errors.PolicyError, match=r"not built.*sample="):
        mp.convert(model)
    report = mp.convert(model, sample=X)
    assert model.attend.compute_dtype == model.dense.compute_dtype == "float16"
    assert report.half_share > 0
    assert np.isfinite(model.predict(X, verbose=0).astype("float32")).all()
