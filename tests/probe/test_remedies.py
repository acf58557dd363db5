"""What a finding proposes mends the model: the probe is silent then."""

import ast
import re

import keras
import numpy as np
import pytest
from keras import ops

import kerasmp as mp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
LARGE = 1e3 * (1 + X**2)


def made(*parts, policy="mixed_float16"):
    """Return a model with functions or layers between two layers."""
    with mp.policy_scope(policy):
        x = inputs = keras.Input((8,))
        for part in (layers.Identity(), *parts):
            x = part(x)
        return keras.Model(inputs, layers.Dense(2, dtype="float32")(x))


def found(model, x):
    """Return the errors and warnings of lint."""
    report = mp.lint(model, x)
    return report.errors + report.warnings


def only(model, x):
    [each] = found(model, x)
    return each


def by_norm(x):
    return x / ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True))


def test_a_division_by_a_norm_becomes_normalize():
    finding = only(made(by_norm), LARGE)
    assert finding.place == "square"
    axis = ast.literal_eval(re.search(r"kerasmp.ops.normalize\(x, axis=(.+?)\)", finding.remedy)[1])
    assert not found(made(lambda x: mp.ops.normalize(x, axis=axis)), LARGE)


def test_a_cast_around_the_operations_mends_them():
    finding = only(made(lambda x: ops.sqrt(ops.square(x))), LARGE)
    assert 'Cast to float32 before it, and back after "sqrt"' in finding.remedy
    wide = lambda x: ops.cast(ops.sqrt(ops.square(ops.cast(x, "float32"))), "float16")  # noqa: E731 - as the others
    assert not found(made(wide), LARGE)


def test_a_cast_that_comes_too_late_is_none():
    finding = only(made(lambda x: ops.sin(2000 * x)), LARGE)  # `x` is rounded already
    assert finding.rule == "not-finite"
    assert "back after" not in finding.remedy


def test_a_stock_layer_becomes_kerasmps():
    model = made(layers.UnitNormalization(name="norm", dtype="mixed_float16"))
    assert "kerasmp.layers.UnitNormalization" in only(model, LARGE).remedy
    with mp.policy_scope("mixed_float16"):
        safe = mp.layers.UnitNormalization()
    assert not found(made(safe), LARGE)


def test_a_rule_for_the_layer_mends_it():
    model = made(layers.UnitNormalization(name="norm", dtype="mixed_float16"))
    path = model.get_layer("norm").path or "norm"
    assert f'the rule {{"{path}": "float32"}}' in only(model, LARGE).remedy
    mp.convert(model, rules=["safe", {path: "float32"}], safe_layers=False)
    assert not found(model, LARGE)


@pytest.mark.parametrize(
    "x", [np.full((4, 8), 7e4) * (1 + X), 20190 + np.arange(32.0).reshape(4, 8) // 8]
)
def test_scaled_data_pass(x):
    model = made()
    assert "Scale the data" in only(model, x).remedy
    assert not found(model, (x - x.mean()) / x.std())
    scaling = layers.Normalization(dtype="float32")
    scaling.adapt(x)
    inputs = keras.Input((8,))
    assert not found(keras.Model(inputs, model(scaling(inputs))), x)


def test_where_nothing_mends_it_the_finding_says_so():
    finding = only(made(lambda x: ops.sin(5000 * x)), X)
    assert finding.remedy == "No remedy that was tried on this batch fixes it."


def test_a_remedy_that_flushes_again_is_none():
    finding = only(made(lambda x: ops.sqrt(ops.square(1e-5 * x)) * 1e4), X)
    assert finding.rule == "underflow"
    assert "and its result back" not in finding.remedy
    assert 'back after "sqrt"' in finding.remedy


class Holder(layers.Layer):
    """A layer without weights, inside another one."""

    def __init__(self):
        super().__init__(name="holder")
        self.inner = layers.UnitNormalization(name="unit")

    def call(self, x):
        return self.inner(x)


# Tracing warns of the constants of stock layers in float16.
@pytest.mark.filterwarnings("ignore:.*overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_a_rule_that_is_proposed_fits_a_layer_inside_another(nested):
    def part():
        inner = layers.UnitNormalization(name="unit")
        return keras.Sequential([keras.Input((8,)), inner], name="holder") if nested else Holder()

    with mp.policy_scope("mixed_float16"):
        finding = only(made(part()), LARGE)
    assert finding.place == "holder/unit"
    rule = ast.literal_eval(re.search(r"the rule (\{.+?\})", finding.remedy)[1])
    with mp.policy_scope("float32"):
        model = made(part(), policy="float32")
    mp.convert(model, mp.Policy("mixed_float16", rules=rule))
    assert not found(model, LARGE)


class Squares(layers.Layer):
    def call(self, x):
        return ops.square(x * 1e3) * 1e-6


def test_a_layer_of_the_user_in_float32_is_judged_in_float32():
    """It widens what the layer before it returns in float16."""
    assert only(made(Squares(dtype="mixed_float16")), X).rule == "not-finite"
    assert not found(made(Squares(dtype="float32")), X)
