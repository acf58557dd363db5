"""The report of lint, and that lint changes nothing."""

import keras
import numpy as np
import pytest
from helpers.linted import Own, X, compiled, dense, found, made
from keras import ops

import kerasmp as mp

layers = keras.layers

# NumPy and JAX warn about the constants that lint looks for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


# The report


def test_the_report_is_sorted_counts_and_reads():
    model = compiled(made(dense(30), layers.UnitNormalization), "mse", keras.optimizers.SGD())
    report = mp.lint(model)
    assert [each.severity for each in report] == ["error", "warning", "hint", "hint"][: len(report)]
    assert len(report.errors) == len(report.warnings) == 1
    assert len(report) == len(str(report).splitlines())
    for each, line in zip(report, str(report).splitlines(), strict=True):
        assert all(part in line for part in (each.severity, each.place, each.rule, each.remedy))
    assert str(mp.lint(made(dense(), policy="float32"))) == "no findings"


@pytest.mark.unit
def test_each_finding_is_reported_once():
    inputs = keras.Input((8,))
    shared = layers.UnitNormalization(dtype="mixed_float16")
    model = keras.Model(inputs, layers.Dense(8)(shared(shared(inputs))))
    assert len(found(model, "unsafe-layer")) == 1


def test_losses_stay_as_the_last_call_left_them():
    model = made(dense(activity_regularizer="l2"))
    x = np.ones((8, 8), "float32")
    model(x)
    before = [float(ops.convert_to_numpy(loss)) for loss in model.losses]
    assert before
    mp.lint(model, x)
    assert [float(ops.convert_to_numpy(loss)) for loss in model.losses] == before


def test_a_model_that_is_not_built_is_built_by_the_batch():
    with mp.policy_scope("mixed_float16"):
        own = Own()
    assert isinstance(mp.lint(own, X), mp.LintReport)
    assert own.built


def test_lint_changes_nothing():
    model = made(dense(), layers.BatchNormalization)
    model.compile(mp.LossScaleOptimizer("sgd"), "mse")
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    mp.lint(model, X)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    model.fit(X, X, verbose=0)


class Keeping(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.table = ops.ones((shape[-1],))

    def call(self, inputs):
        self.last = inputs * ops.cast(self.scale, inputs.dtype)
        return self.last


def test_no_tensor_of_a_call_by_lint_stays_in_a_layer():
    model = made(lambda: Keeping(name="keeping"), dense())
    layer = model.get_layer("keeping")
    last = np.ones(8, "float32")
    layer.last = last
    mp.lint(model)
    assert layer.last is last
    mp.lint(model, X)
    assert layer.last is last
    model.compile(mp.LossScaleOptimizer("sgd"), "mse")
    monitor = mp.callbacks.OverflowMonitor()
    monitor.set_model(model)
    monitor.on_train_begin()
    assert layer.last is last


class Late(keras.Model):
    def __init__(self):
        super().__init__()
        self.part = Keeping(dtype="mixed_float16")

    def build(self, shape):
        self.part.build(shape)

    def call(self, inputs):
        return self.part(inputs)


def test_tensors_that_building_makes_stay():
    model = Late()
    mp.lint(model, X)
    assert ops.convert_to_numpy(model.part.table).sum() == 8
    assert ops.convert_to_numpy(model(X)).sum() == 64


@pytest.mark.backend("tensorflow")  # where variables are tensors
def test_variables_that_a_traced_call_makes_stay():
    model = Late()
    model.built = True  # it counts as built, but its part is built by its first call
    mp.lint(model, X)
    assert ops.convert_to_numpy(model(X)).sum() == 64


class HalfMaster(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), dtype="float16", name="scale")

    def call(self, inputs):
        return inputs * ops.cast(self.scale, inputs.dtype)


@pytest.mark.parametrize("module", [keras, mp])
def test_the_parts_of_a_model_without_call_are_checked(module):
    class Gan(module.Model):
        def __init__(self):
            super().__init__()
            self.inner = [made(HalfMaster, layers.UnitNormalization, dense(30), bare=True)]

    model = Gan()
    model.compile()
    report = mp.lint(model, X)
    assert {each.rule for each in report} == {
        *("half-master", "unsafe-layer", "float16-head"),
        *(["unscaled"] if module is keras else []),
    }
    assert not model.built


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("built", [True, False])
def test_a_model_that_cannot_be_called_is_a_finding(built):
    class Mixes(layers.Layer):
        def call(self, inputs):
            return inputs + keras.random.normal((8,))

        def compute_output_shape(self, shape):
            return shape

    with mp.policy_scope("mixed_float16"):
        model = keras.Sequential(([keras.Input((8,))] if built else []) + [Mixes(name="mixes")])
    [each] = [each for each in mp.lint(model, X) if each.rule == "cannot-compute"]
    assert each.severity == "error"
    assert each.place.endswith("mixes")
    assert "does not match type" in each.reason or "float" in each.reason
