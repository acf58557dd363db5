"""The `output` of a policy, which stock Keras models cannot follow."""

import keras
import numpy as np
import pytest

import kerasmp as mp

X = np.ones((4, 3), "float32")


def sequential(model_class):
    return model_class([keras.Input((3,)), keras.layers.Dense(2)])


def functional(model_class):
    inputs = keras.Input((3,))
    return model_class(inputs, {"a": keras.layers.Dense(2)(inputs), "b": inputs})


def subclassed(model_class):
    class Own(model_class):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs)

    return Own()


KINDS = {"sequential": sequential, "functional": functional, "subclassed": subclassed}


def dtypes(outputs):
    return {keras.backend.standardize_dtype(t.dtype) for t in keras.tree.flatten(outputs)}


def build(kind, keras_module):
    model_class = keras_module.Sequential if kind == "sequential" else keras_module.Model
    with pytest.warns(mp.errors.PolicyWarning), mp.policy_scope("compute=float16,output=float32"):
        return KINDS[kind](model_class)


@pytest.mark.unit
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_the_dtype_that_the_policy_names(kind):
    model = build(kind, mp)
    assert dtypes(model(X)) == {"float32"}
    layer = next(part for part in model.layers if isinstance(part, keras.layers.Dense))
    assert layer.compute_dtype == "float16"


@pytest.mark.full
def test_stock_models_do_not_follow_the_output_dtype():
    assert "float16" in dtypes(build("functional", keras)(X))


@pytest.mark.parametrize("kind", ["sequential", "functional"])
def test_the_dtype_survives_saving_whatever_the_global_policy(kind, tmp_path):
    model = build(kind, mp)
    model.save(tmp_path / "model.keras")
    assert dtypes(keras.models.load_model(tmp_path / "model.keras")(X)) == {"float32"}


def test_a_model_made_without_such_a_policy_is_not_given_one_on_loading(tmp_path):
    with mp.policy_scope("mixed_float16"):
        sequential(mp.Sequential).save(tmp_path / "model.keras")
    with pytest.warns(mp.errors.PolicyWarning), mp.policy_scope("compute=float16,output=float32"):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert dtypes(loaded(X)) == {"float16"}


@pytest.mark.unit
def test_symbolic_and_eager_outputs_have_the_same_dtype():
    model = build("sequential", mp)
    symbolic = model(keras.Input((3,)))
    assert dtypes(symbolic) == {"float32"}


def test_predictions_have_the_dtype_that_the_policy_names():
    assert dtypes(build("functional", mp).predict(X, verbose=0)) == {"float32"}
