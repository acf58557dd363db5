"""Tells when Keras moves a private name that kerasmp uses, or changes what it does."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers.interrupting import interrupted

import kerasmp
from kerasmp.backend import keras_internals

PACKAGE = Path(kerasmp.__file__).parent


def test_an_interrupt_while_traces_are_put_back_leaves_none():
    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.calls, self.seen = 0, []

        def call(self, inputs):
            self.calls += 1
            self.seen.append(inputs)
            return inputs

    layer = Counts()
    layer.build((2,))

    def traced():
        with keras_internals.preserve_layers(layer):
            layer(keras.KerasTensor((2,)))

    number = 0
    while interrupted(traced, number):
        assert layer.calls == len(layer.seen) == 0
        number += 1
    assert number > 5


def test_functional_is_the_class_of_a_model_made_from_inputs_and_outputs():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    assert type(model) is keras_internals.Functional
    assert issubclass(keras_internals.Functional, keras.Model)
    assert not isinstance(keras.Sequential(), keras_internals.Functional)


def test_a_sequential_keeps_a_functional_inside_and_is_none():
    assert not issubclass(keras.Sequential, keras_internals.Functional)


@pytest.mark.parametrize(
    ("args", "kwargs", "functional"),
    [
        ((1, 2), {}, True),
        ((1,), {"outputs": 2}, True),
        ((), {"inputs": 1, "outputs": 2}, True),
        ((1, 2), {"name": "model"}, True),
        ((), {}, False),
        ((1,), {}, False),
        ((), {"inputs": 1}, False),
        ((), {"outputs": 2, "name": "model"}, False),
    ],
)
def test_functional_init_arguments_wants_inputs_and_outputs(args, kwargs, functional):
    assert bool(keras_internals.functional_init_arguments(args, kwargs)) is functional


def test_float16_layers_are_found_at_every_depth():
    inner = keras.layers.Dense(1, dtype="mixed_float16", name="deep")
    model = keras.Sequential([keras.layers.TimeDistributed(inner, dtype="float32")])
    assert [layer.name for layer in keras_internals.float16_layers(model)] == ["deep"]


def test_the_mask_that_a_layer_leaves_can_be_handed_on():
    embedded = keras.layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 0]]))
    plain = keras.ops.cast(embedded, "float16")
    kept = keras_internals.copy_mask(embedded, plain)
    summed = keras.layers.GlobalAveragePooling1D(dtype="float16")(kept)
    expected = keras.ops.convert_to_numpy(embedded)[:, 0]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(summed), expected, rtol=1e-3)


def test_losses_stay_what_they_were():
    layer = keras.layers.Dense(1, activity_regularizer="l2")
    model = keras.Sequential([keras.Input((2,)), layer])
    model(np.ones((1, 2)))
    before = [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses]
    with keras_internals.preserve_losses(model):
        model(np.zeros((1, 2)))
        assert [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses] != before
    assert [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses] == before


class Nest(keras.layers.Layer):
    def __init__(self):
        super().__init__(name="nest")
        self.parts = {"one": keras.layers.Dense(1, name="in_dict"), "two": [Leaf()]}


class Leaf(keras.layers.Layer):
    def __init__(self):
        super().__init__(name="leaf")
        self.inner = keras.layers.Dense(1, name="in_leaf")


def test_flatten_layers_reaches_every_depth_and_begins_with_the_layer_itself():
    model = keras.Sequential(
        [
            keras.layers.TimeDistributed(keras.layers.Dense(1, name="wrapped"), name="time"),
            keras.layers.MultiHeadAttention(1, 2, name="attention"),
            Nest(),
        ]
    )
    model.layers[1].build((1, 3, 1), (1, 3, 1))
    layers = keras_internals.flatten_layers(model)
    assert layers[0] is model
    names = [layer.name for layer in layers]
    assert {"wrapped", "time", "attention", "query", "nest", "in_dict", "leaf", "in_leaf"} <= set(
        names
    )
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("scope", "dtype"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_an_autocast_scope_decides_in_which_dtype_a_layer_reads_variables(scope, dtype):
    class Reader(keras.layers.Layer):
        def build(self, _):
            self.kernel = self.add_weight(shape=(1,))

        def call(self, inputs):
            with keras_internals.AutocastScope(scope):
                found.append(keras.backend.standardize_dtype(self.kernel.value.dtype))
            found.append(keras.backend.standardize_dtype(self.kernel.value.dtype))
            return inputs

    found = []
    Reader(dtype="mixed_float16")(keras.ops.ones((1, 1)))
    assert found == [dtype, "float16"]


def test_autocast_of_a_variable_can_be_turned_off_and_on_after_it_was_made():
    class Reader(keras.layers.Layer):
        def build(self, _):
            self.kernel = self.add_weight(shape=(1,))
            self.fixed = self.add_weight(shape=(1,), trainable=False, autocast=False)
            self.inner = keras.layers.Dense(1)

        def call(self, inputs):
            found.append(keras.backend.standardize_dtype((self.kernel + 0).dtype))
            return self.inner(inputs)

    found = []
    layer = Reader(dtype="mixed_float16")
    layer(keras.ops.ones((1, 1)))
    assert keras_internals.own_variables(layer) == [layer.kernel, layer.fixed]
    assert keras_internals.autocasts(layer.kernel)
    assert not keras_internals.autocasts(layer.fixed)
    for to in (False, True):
        keras_internals.set_autocast(layer.kernel, to=to)
        layer(keras.ops.ones((1, 1)))
    assert found[-3:] == ["float16", "float32", "float16"]


def test_own_variables_are_those_of_no_layer_inside():
    inner = keras.layers.Dense(2)
    outer = keras.layers.TimeDistributed(inner)
    outer.build((None, 3, 4))
    assert keras_internals.own_variables(outer) == []
    assert [id(v) for v in keras_internals.own_variables(inner)] == [
        id(inner.kernel),
        id(inner.bias),
    ]
    norm = keras.layers.BatchNormalization()
    norm.build((None, 4))
    assert {v.name for v in keras_internals.own_variables(norm)} == {
        "gamma",
        "beta",
        "moving_mean",
        "moving_variance",
    }


def test_own_variables_of_a_stateful_layer_have_its_states():
    layer = keras.layers.LSTM(2, stateful=True)
    layer.build((3, 5, 4))
    assert [v.shape for v in keras_internals.own_variables(layer)] == [(3, 2), (3, 2)]


def test_layers_and_variables_keep_what_they_hold_where_it_was():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    assert layer._trainable_variables == [layer.kernel, layer.bias]
    assert layer._non_trainable_variables == []
    assert layer.kernel._dtype == "float32"
    assert layer.kernel._value is layer.kernel.value


def test_the_parent_classes_still_have_what_the_optimizer_calls():
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


def test_weights_stand_beside_the_averages_that_are_kept_of_them():
    variables = [keras.Variable([1.0], name="a"), keras.Variable([2.0], name="b")]
    variables[0].overwrite_with_gradient = True
    averaging = keras.optimizers.SGD(0.1, use_ema=True)
    assert keras_internals.weights_and_averages(averaging) == []  # not built
    averaging.build(variables)
    ((weight, average),) = keras_internals.weights_and_averages(averaging)
    assert weight is variables[1]
    assert average.path.endswith("b_average")
    plain = keras.optimizers.SGD(0.1)
    plain.build(variables)
    assert keras_internals.weights_and_averages(plain) == []


@pytest.mark.backend("jax")
def test_during_fit_the_optimizers_values_are_beside_its_variables():
    seen = []

    class Reads(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):  # noqa: ARG002 - Keras gives it
            # Not of self.model, which puts all into the variables.
            pairs = keras_internals.optimizer_in_fit(model)
            values = {v.name: int(value) for v, value in pairs if v.name == "iteration"}
            seen.append((batch, values.get("iteration", 0)))

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=1, verbose=0, callbacks=[Reads()])
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert keras_internals.optimizer_in_fit(model) == []


def test_what_holds_variables_are_their_values():
    first, second = keras.Variable([1.0]), keras.Variable([2.0])
    assert keras_internals.values_of([first, second]) == [first.value, second.value]
    other = keras.ops.ones((1,))
    with keras.StatelessScope(state_mapping=[(second, other)]):
        assert keras_internals.values_of([first, second])[1] is other


def test_no_other_room_imports_keras_privates():
    offenders = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            if any(m.startswith("keras.src") for m in modules) and path.parent.name != "backend":
                offenders.append(str(path.relative_to(PACKAGE)))
    assert not offenders


def test_learning_rate_schedules_are_found_and_numbers_are_not():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [2.0, 1.0])
    optimizer = keras.optimizers.SGD(schedule)
    assert keras_internals.learning_rate_schedules(optimizer) == [(optimizer, schedule)]
    assert keras_internals.learning_rate_schedules(keras.optimizers.SGD(0.1)) == []


def test_learning_rate_functions_are_found_and_schedules_and_numbers_are_not():
    def rate():
        return 0.5

    optimizer = keras.optimizers.SGD(rate)
    assert keras_internals.learning_rate_functions(optimizer) == [(optimizer, rate)]
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    for other in (0.1, schedule):
        assert keras_internals.learning_rate_functions(keras.optimizers.SGD(other)) == []
