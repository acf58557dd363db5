"""Fails if Keras moves a private name that kerasmp uses, or changes what it does."""

import ast
import random
from pathlib import Path

import keras
import numpy as np
import pytest

import kerasmp
from kerasmp.backend import keras_internals

PACKAGE = Path(kerasmp.__file__).parent


def test_functional_is_the_class_of_a_model_made_from_inputs_and_outputs():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    assert type(model) is keras_internals.Functional
    assert issubclass(keras_internals.Functional, keras.Model)
    assert not isinstance(keras.Sequential(), keras_internals.Functional)


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
def test_functional_init_arguments_requires_inputs_and_outputs(args, kwargs, functional):
    assert bool(keras_internals.functional_init_arguments(args, kwargs)) is functional


def test_float16_layers_are_found_at_every_depth():
    inner = keras.layers.Dense(1, dtype="mixed_float16", name="deep")
    model = keras.Sequential([keras.layers.TimeDistributed(inner, dtype="float32")])
    assert [layer.name for layer in keras_internals.float16_layers(model)] == ["deep"]


def test_the_mask_of_a_layers_output_can_be_copied():
    embedded = keras.layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 0]]))
    plain = keras.ops.cast(embedded, "float16")
    kept = keras_internals.copy_mask(embedded, plain)
    summed = keras.layers.GlobalAveragePooling1D(dtype="float16")(kept)
    expected = keras.ops.convert_to_numpy(embedded)[:, 0]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(summed), expected, rtol=1e-3)


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


def test_autocast_of_an_existing_variable_can_be_turned_off_and_on():
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


def test_own_variables_exclude_those_of_layers_inside():
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


def test_own_variables_of_a_stateful_layer_include_its_states():
    layer = keras.layers.LSTM(2, stateful=True)
    layer.build((3, 5, 4))
    assert [v.shape for v in keras_internals.own_variables(layer)] == [(3, 2), (3, 2)]


def test_the_private_attributes_of_layers_and_variables_exist():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    assert layer._trainable_variables == [layer.kernel, layer.bias]
    assert layer._non_trainable_variables == []
    assert layer.kernel._dtype == "float32"
    assert layer.kernel._value is layer.kernel.value


def test_values_of_variables_are_their_tensors_or_those_of_a_scope():
    first, second = keras.Variable([1.0]), keras.Variable([2.0])
    assert keras_internals.values_of([first, second]) == [first.value, second.value]
    other = keras.ops.ones((1,))
    with keras.StatelessScope(state_mapping=[(second, other)]):
        assert keras_internals.values_of([first, second])[1] is other


def test_names_are_counted_from_the_start_inside_and_go_on_afterwards():
    def name():
        return keras.layers.Dense(1).name

    first = name()
    with keras_internals.preserve_names():
        assert [name(), name()] == ["dense", "dense_1"]
    number = int(first.rpartition("_")[2]) if "_" in first else 0
    assert name() == f"dense_{number + 1}"


def test_the_global_seed_generator_is_restored_or_taken_away_again():
    def draw():
        return keras.ops.convert_to_numpy(keras.random.normal((2,))).tolist()

    keras.backend.clear_session(free_memory=False)  # an older Keras keeps its generator
    keras.utils.set_random_seed(5)
    expected = [draw(), draw()]
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    first = draw()
    with keras_internals.preserve_global_seed() as state:
        before = keras.ops.convert_to_numpy(state.value).tolist()
        draw()
        assert keras.ops.convert_to_numpy(state.value).tolist() != before
    assert [first, draw()] == expected
    keras.backend.clear_session(free_memory=False)
    drawn = random.getstate()
    with keras_internals.preserve_global_seed():
        draw()
    assert random.getstate() == drawn
    assert keras_internals.global_state.get_global_attribute("global_seed_generator") is None


def test_no_other_package_imports_keras_privates():
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
