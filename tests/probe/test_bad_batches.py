"""A batch that is none is an error that says so; nothing changes."""

import keras
import numpy as np
import pytest

import kerasmp as mp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")


def made():
    with mp.policy_scope("mixed_float16"):
        first = layers.Dense(8)
    return keras.Sequential([keras.Input((8,)), first, layers.Dense(2, dtype="float32")])


@pytest.mark.parametrize(
    ("x", "received"),
    [
        (X[:, :5], "float32 of shape (4, 5)"),
        ([X, X], "float32 of shape (4, 8), float32 of shape (4, 8)"),
        (X * 1j, "complex"),
        (X[:0], "array"),
        (iter([X]), "iterator"),
        ([], "list"),
        (1.0, "float"),
        ("words", "str"),
    ],
    ids=["shape", "two", "complex", "empty", "iterator", "list", "number", "text"],
)
def test_what_is_no_batch_of_the_model_is_an_error(x, received):
    model = made()
    weights = model.get_weights()
    calls = {"x": lambda: mp.lint(model, x), "sample": lambda: mp.convert(model, sample=x)}
    for name, call in calls.items():
        if name == "sample" and received == "complex":
            continue  # Keras takes it
        with pytest.raises(mp.errors.ArgumentError, match=f"`{name}`") as caught:
            call()
        assert received in str(caught.value)
        assert "model.predict_on_batch" in str(caught.value)
    assert model.layers[0].compute_dtype == "float16"
    assert model.layers[1].compute_dtype == "float32"
    for now, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_a_finding_about_the_data_alone(value):
    model, x = made(), X.copy()
    x[1, 2] = value
    for report in (mp.lint(model, x), mp.convert(model, sample=x)):
        [each] = [each for each in report.findings if each.severity != "hint"]
        assert (each.rule, each.severity) == ("nonfinite-data", "error")
    assert each.place == "sample"
    x[2, 3] = 7e4
    rules = {each.rule for each in mp.lint(model, x).errors}
    assert rules == {"input-range", "nonfinite-data"}
