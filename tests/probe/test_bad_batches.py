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
    with pytest.raises(mp.errors.ArgumentError, match=r"`x`") as caught:
        mp.lint(model, x)
    assert received in str(caught.value)
    assert "model.predict_on_batch" in str(caught.value)
    for now, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_in_float32_either_are_no_finding(value):
    model, x = made(), X.copy()
    x[1, 2] = value
    report = mp.lint(model, x)
    assert not report.errors + report.warnings, str(report)
    x[2, 3] = 7e4
    assert {each.rule for each in mp.lint(model, x).errors} == {"input-range"}
