"""Findings of lint about numbers that float16 cannot hold, in the source or in the graph."""

import keras
import numpy as np
import pytest
from helpers.linted import SmallNumber, X, found, made, only

import kerasmp as mp

layers = keras.layers

# NumPy and JAX warn about the constants that lint looks for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


# vanishing-epsilon, possibly-vanishing


class Divides(layers.Layer):
    def __init__(self, epsilon=1e-8, **settings):
        super().__init__(**settings)
        self.epsilon = epsilon

    def call(self, inputs):
        return inputs / (keras.ops.max(inputs, -1, keepdims=True) + self.epsilon)


class CarefulSmallNumber(layers.Layer):
    def call(self, inputs):
        wide = keras.ops.cast(inputs, "float32")
        return keras.ops.cast(wide / (wide + 1e-9), inputs.dtype)


def test_an_epsilon_that_underflows_is_a_warning():
    each = only(made(Divides), "vanishing-epsilon")
    assert each.severity == "warning"
    assert "1e-08" in each.reason


def test_larger_epsilons_stock_layers_and_float32_give_no_finding():
    assert not found(made(lambda: Divides(1e-6)), "vanishing-epsilon")
    assert not found(made(lambda: Divides(0.0)), "vanishing-epsilon")
    assert not found(made(lambda: Divides(dtype="float32")), "vanishing-epsilon")
    assert not found(made(lambda: layers.LayerNormalization(epsilon=1e-9)), "vanishing-epsilon")


def test_a_small_number_in_the_source_is_possibly_a_fault():
    each = only(made(SmallNumber), "possibly-vanishing")
    assert each.severity == "warning"
    assert each.reason.startswith("Possible")
    assert "`call`" in each.reason


def test_code_that_names_float32_and_layers_in_float32_give_no_finding():
    assert not found(made(CarefulSmallNumber), "possibly-vanishing")
    assert not found(made(lambda: SmallNumber(dtype="float32")), "possibly-vanishing")
    assert not found(made(Divides), "possibly-vanishing")  # a constructor computes nothing


# infinite-constant, possibly-infinite


class MaskedSum(layers.Layer):
    def call(self, inputs):
        mask = keras.ops.cast(inputs > 0, inputs.dtype)
        return inputs + (1.0 - mask) * -1e9


class MaskedChoice(layers.Layer):
    def call(self, inputs):
        return keras.ops.where(inputs > 0, inputs, -1e9)


class Clips(layers.Layer):
    def call(self, inputs):
        return keras.ops.clip(inputs, -1e9, 1e9)


class Modest(layers.Layer):
    def call(self, inputs):
        return keras.ops.where(inputs > 0, inputs, -3e4) + 6e4 * inputs


HAS_GRAPH = keras.backend.backend() != "torch"


@pytest.mark.backend("tensorflow", "jax")
def test_computing_with_an_infinite_constant_is_an_error():
    model = made(lambda: MaskedSum(name="mine"))
    each = only(model, "infinite-constant", X)
    assert each.severity == "error"
    assert each.place == model.layers[0].path
    assert not found(model, "possibly-infinite", X)  # reported already, from the graph


@pytest.mark.backend("tensorflow", "jax")
def test_selecting_an_infinite_constant_is_a_warning():
    assert only(made(MaskedChoice), "infinite-constant", X).severity == "warning"


@pytest.mark.backend("tensorflow", "jax")
def test_constants_in_arrays_are_seen():
    class Adds(layers.Layer):
        def call(self, inputs):
            return inputs + keras.ops.cast(np.full((8,), -1e9, "float32"), inputs.dtype)

    assert only(made(Adds), "infinite-constant", X).severity == "error"


@pytest.mark.parametrize(
    "layer",
    [Clips, Modest, lambda: MaskedSum(dtype="float32"), lambda: layers.Reshape((8, 1))],
)
def test_harmless_constants_give_no_finding(layer):
    assert not found(made(layer, layers.Flatten), "infinite-constant", X)


def test_pooling_gives_no_finding():
    model = made(lambda: layers.MaxPooling1D(2, padding="same"), layers.Flatten, shape=(8, 8))
    assert not mp.lint(model, np.ones((8, 8, 8), "float32")).warnings


def test_without_data_a_large_number_in_the_source_is_possibly_a_fault():
    for layer in (MaskedSum, MaskedChoice):
        each = only(made(layer), "possibly-infinite")
        assert each.severity == "warning"
        assert "Possible" in each.reason
    assert not found(made(Modest), "possibly-infinite")
    assert bool(found(made(MaskedSum), "possibly-infinite", X)) != HAS_GRAPH
