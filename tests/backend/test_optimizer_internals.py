"""Fails if Keras moves a private name of its optimizers that kerasmp uses, or changes it."""

import keras
import numpy as np
import pytest

from kerasmp.backend import optimizer_internals


def test_the_private_attributes_of_optimizers_exist():
    optimizer = keras.optimizers.SGD()
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    assert optimizer._get_variable_index(variable) == 0
    assert optimizer._trainable_variables == [variable]
    optimizer._check_variables_are_known([variable])
    wrapper = keras.optimizers.LossScaleOptimizer(optimizer)
    wrapper.build([variable])
    # The order that stateless_apply takes and returns: own variables, then the inner ones.
    own = len(wrapper._variables)
    assert [id(v) for v in wrapper.variables[own:]] == [id(v) for v in optimizer.variables]
    # Where our loader looks for them in stock Keras's files.
    assert wrapper.variables[2] is wrapper.step_counter
    assert wrapper.variables[3] is wrapper.dynamic_scale


def test_weights_are_paired_with_their_averages():
    variables = [keras.Variable([1.0], name="a"), keras.Variable([2.0], name="b")]
    variables[0].overwrite_with_gradient = True
    averaging = keras.optimizers.SGD(0.1, use_ema=True)
    assert optimizer_internals.weights_and_averages(averaging) == []  # not built
    averaging.build(variables)
    ((weight, average),) = optimizer_internals.weights_and_averages(averaging)
    assert weight is variables[1]
    assert average.path.endswith("b_average")
    plain = keras.optimizers.SGD(0.1)
    plain.build(variables)
    assert optimizer_internals.weights_and_averages(plain) == []


@pytest.mark.backend("jax")
def test_the_state_that_fit_passes_around_is_paired_with_variables():
    seen = []

    class Reads(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):  # noqa: ARG002 - Keras gives it
            # Not of self.model, which puts all into the variables.
            pairs = optimizer_internals.optimizer_state_in_fit(model)
            values = {v.name: int(value) for v, value in pairs if v.name == "iteration"}
            seen.append((batch, values.get("iteration", 0)))

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=1, verbose=0, callbacks=[Reads()])
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert optimizer_internals.optimizer_state_in_fit(model) == []


def test_learning_rate_schedules_are_found_and_numbers_are_not():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [2.0, 1.0])
    optimizer = keras.optimizers.SGD(schedule)
    assert optimizer_internals.learning_rate_schedules(optimizer) == [(optimizer, schedule)]
    assert optimizer_internals.learning_rate_schedules(keras.optimizers.SGD(0.1)) == []


def test_learning_rate_functions_are_found_and_schedules_and_numbers_are_not():
    def rate():
        return 0.5

    optimizer = keras.optimizers.SGD(rate)
    assert optimizer_internals.learning_rate_functions(optimizer) == [(optimizer, rate)]
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    for other in (0.1, schedule):
        assert optimizer_internals.learning_rate_functions(keras.optimizers.SGD(other)) == []
