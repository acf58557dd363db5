"""Fault 11: a user-defined `compile` whose optimizers are not wrapped."""

import keras
import numpy as np
import pytest

import kerasmp as mp

X = np.ones((8, 4), "float32")


def adversaries(module, dtype):
    class Adversaries(module.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1, dtype=dtype)

        def build(self, input_shape):
            self.dense.build(input_shape)
            self.built = True

        def call(self, inputs):
            return self.dense(inputs)

        def compile(self, d_opt, g_opt):
            super().compile("sgd", "mse")
            self.d_opt, self.g_opt = d_opt, g_opt

    model = Adversaries()
    model.build((None, 4))
    return model


@pytest.mark.full
def test_stock_keras_gives_no_warning():
    model = adversaries(keras, "mixed_float16")
    model.compile(keras.optimizers.Adam(), keras.optimizers.Adam())
    model.fit(X, X[:, :1], verbose=0)


def test_unwrapped_optimizers_are_named():
    model = adversaries(mp, "mixed_float16")
    model.compile(keras.optimizers.Adam(), keras.optimizers.Adam())
    with pytest.warns(mp.errors.LossScaleWarning, match=r"\(d_opt, g_opt\).*Wrap each"):
        model.fit(X, X[:, :1], verbose=0)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_scaling_optimizers_and_float32_give_no_warning(dtype):
    model = adversaries(mp, dtype)
    scaled = [keras.optimizers.Adam() for _ in range(2)]
    if dtype == "mixed_float16":
        scaled = [mp.LossScaleOptimizer(optimizer) for optimizer in scaled]
    model.compile(*scaled)
    model.fit(X, X[:, :1], verbose=0)


@pytest.mark.parametrize("wrap", [lambda o: o, mp.LossScaleOptimizer], ids=["by us", "by the user"])
def test_an_attribute_that_is_the_compiled_optimizer_gives_no_warning(wrap):
    model = mp.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_float16")])
    model.base = keras.optimizers.Adam()
    model.compile(wrap(model.base), "mse")
    model.fit(X, X[:, :1], verbose=0)
    assert model.optimizer.inner_optimizer is model.base
