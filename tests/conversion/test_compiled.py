"""Conversion of compiled models: optimizer and steps follow, and a failure changes nothing."""

import keras
import numpy as np
import pytest
from helpers.converted import sequential
from helpers.flattened import flatten_layers
from helpers.interrupting import interrupted
from helpers.marks import full, marks_on
from helpers.replaced_layers import assert_state, state

import kerasmp as mp

pytestmark = marks_on("jax")

layers = keras.layers
X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")


def compiled(optimizer):
    """Return a model with all state of training but untraced steps, which take a second."""
    keras.utils.set_random_seed(0)
    model = sequential()
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    return model


def test_a_compiled_optimizer_is_wrapped_with_its_state_and_unwrapped_again():
    model = compiled("adam")
    model.fit(X, np.ones((8, 3)), verbose=0, epochs=2)
    adam = model.optimizer
    state = [keras.ops.convert_to_numpy(v.value) for v in adam.variables]
    report = mp.convert(model)
    assert isinstance(model, mp.Sequential)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert model.optimizer.inner_optimizer is adam
    for variable, before in zip(adam.variables, state, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable.value), before)
    assert any("the optimizer Adam is wrapped" in note for note in report.notes)
    model.fit(X, np.ones((8, 3)), verbose=0)
    steps = 2 + int(model.optimizer.applied_steps)
    assert int(adam.iterations) == steps
    report.restore()
    assert model.optimizer is adam
    assert type(model) is keras.Sequential
    model.fit(X, np.ones((8, 3)), verbose=0)
    assert int(adam.iterations) == steps + 1


def test_attributes_set_on_the_model_come_back_unchanged():
    def step(*_):
        raise AssertionError

    model = compiled("adam")
    model.train_step, model.get_config = step, dict
    report = mp.convert(model)
    model.make_train_function()
    model.compute_loss = step
    assert model.train_step is not step
    report.restore()
    kept = (model.train_step, model.compute_loss, model.get_config)
    assert kept == (step, step, dict)


def test_the_stock_wrapper_is_replaced_with_its_scale_and_comes_back():
    model = compiled(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=512.0)
    )
    stock = model.optimizer
    report = mp.convert(model)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert model.optimizer.loss_scale == 512
    report.restore()
    assert model.optimizer is stock


def test_a_wrapped_optimizer_stays_and_so_does_one_compiled_afterwards():
    model = compiled(mp.LossScaleOptimizer("sgd", loss_scale=8.0))
    optimizer = model.optimizer
    report = mp.convert(model)
    assert model.optimizer is optimizer
    assert report.notes == ()
    model.compile("adam", "mse")
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    later = model.optimizer
    report.restore()
    assert model.optimizer is later
    assert type(model) is keras.Sequential


def test_bfloat16_needs_no_loss_scale():
    model = compiled("adam")
    adam = model.optimizer
    assert mp.convert(model, "mixed_bfloat16").notes == ()
    assert model.optimizer is adam


def test_optimizers_of_a_user_defined_compile_are_named():
    class Adversarial(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

        def compile(self, first, second):
            super().compile(loss="mse")
            self.first, self.second = first, second

    model = Adversarial()
    model(X)
    model.compile(keras.optimizers.SGD(), mp.LossScaleOptimizer("sgd"))
    with pytest.warns(mp.errors.LossScaleWarning, match=r"its optimizers \(first\)"):
        report = mp.convert(model, rules=None)
    assert any("nothing scales the loss of first" in note for note in report.notes)


# Of the hundreds of calls that kerasmp makes of its functions, a sample is interrupted.
STEPS = pytest.mark.parametrize("step", [13, full(1)])


@STEPS
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(step):
    model = compiled("adam")
    before, adam = model.predict(X, verbose=0), model.optimizer
    kept, steps = state(model), (model.train_function, model.predict_function)

    reports = []

    def convert():
        reports.append(
            mp.convert(model, "float16", variables="float16", safe_layers=True, sample=X)
        )

    number = 0
    while interrupted(convert, number):
        assert_state(model, kept)
        assert (model.train_function, model.predict_function) == steps
        assert type(model) is keras.Sequential
        assert model.optimizer is adam
        assert {layer.compute_dtype for layer in flatten_layers(model)} == {"float32"}
        number += step
    assert number > 500
    reports[0].restore()
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)


class Interrupting(layers.Dense):
    """Raises an interrupt when its policy is set, as often as its list says."""

    interrupts = ()

    @property
    def dtype_policy(self):
        return layers.Layer.dtype_policy.fget(self)

    @dtype_policy.setter
    def dtype_policy(self, policy):
        if self.interrupts and self.interrupts.pop(0):
            raise KeyboardInterrupt
        layers.Layer.dtype_policy.fset(self, policy)


def interrupting():
    """Return a model with an `Interrupted` layer, and the policies of all layers."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2), Interrupting(2), layers.Dense(1)])
    model.compile("sgd")
    model.train_function = len
    return model, {layer: layer.dtype_policy for layer in flatten_layers(model)}


def test_a_second_interrupt_leaves_nothing_half_done():
    model, kept = interrupting()
    for number in range(100):
        model.layers[1].interrupts = [*[False] * number, True, True]
        try:
            mp.convert(model)
        except KeyboardInterrupt:
            assert {layer: layer.dtype_policy for layer in kept} == kept
            assert (type(model), model.train_function) == (keras.Sequential, len)
        else:
            break
    assert number


def test_an_interrupted_restore_is_completed():
    model, kept = interrupting()
    report = mp.convert(model)
    model.layers[1].interrupts = [True]
    with pytest.raises(KeyboardInterrupt):
        report.restore()
    assert {layer: layer.dtype_policy for layer in kept} == kept
    assert type(model) is keras.Sequential


@pytest.mark.parametrize(
    "how", [{}, {"safe_layers": True}, {"policy": "float16", "variables": "float16"}]
)
def test_the_model_becomes_what_a_dry_run_says(how):
    model = compiled("adam")
    kept = state(model)
    dry = mp.convert(model, dry_run=True, **how)
    assert_state(model, kept)
    report = mp.convert(model, **how)
    assert str(report) == str(dry)
    assert report.layer_policies == dry.layer_policies == mp.LayerPolicies.of(model)
    for row in report.rows:
        policy = row.layer.dtype_policy.name
        assert (row.class_name, row.after) == (type(row.layer).__name__, policy)
    wrapped = isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert ("is wrapped in kerasmp.LossScaleOptimizer" in str(dry)) is wrapped
    assert ("is removed with its state" in str(dry)) is (model.optimizer is None)
