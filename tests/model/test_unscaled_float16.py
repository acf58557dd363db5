"""Fault 11: stock Keras silently trains float16 without loss scaling; kerasmp scales."""

import keras
import numpy as np
import pytest
from helpers.marks import few

import kerasmp as mp

Stock = keras.optimizers.LossScaleOptimizer
DTypePolicyMap = keras.dtype_policies.DTypePolicyMap


def network(module, **settings):
    return module.Sequential([keras.Input((4,)), keras.layers.Dense(2, **settings)])


def a_layer_alone(module):
    return network(module, dtype="mixed_float16")


def a_map_for_a_layer(module):
    return network(module, dtype=DTypePolicyMap(default_policy="mixed_float16"))


def a_map_that_names_a_part(module):
    """Return a model whose only float16 layer is inside a float32 layer."""
    policies = DTypePolicyMap(default_policy="float32")
    policies["attention/query"] = keras.DTypePolicy("mixed_float16")
    inputs = keras.Input((3, 4))
    layer = keras.layers.MultiHeadAttention(1, 4, dtype=policies, name="attention")
    outputs = layer(inputs, inputs)
    assert layer.compute_dtype == "float32"
    return module.Model(inputs, outputs)


def a_map_for_all(module):
    keras.config.set_dtype_policy(DTypePolicyMap(default_policy="mixed_float16"))
    return network(module)


def pure_float16(module):
    keras.config.set_dtype_policy("float16")
    return network(module)


def set_to_float16_later(module):
    model = network(module)
    model.layers[0].dtype_policy = "mixed_float16"
    return model


MODELS = [
    a_layer_alone,
    a_map_for_a_layer,
    a_map_that_names_a_part,
    a_map_for_all,
    pure_float16,
    set_to_float16_later,
]
every_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


@pytest.mark.full
@every_model
def test_stock_keras_neither_scales_nor_warns(build):
    model = build(keras)
    model.compile("adam", "mse")  # a warning would fail the test
    assert not isinstance(model.optimizer, Stock)


@every_model
def test_a_kerasmp_model_scales(build):
    model = build(mp)
    model.compile("adam", "mse")
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)


# One with float16 layers at depth only.
@pytest.mark.filterwarnings("ignore:Before the first step")  # other findings
@pytest.mark.parametrize("build", few(MODELS, [a_map_that_names_a_part]))
def test_the_monitor_warns_of_unscaled_float16_in_a_stock_model(build):
    model = build(keras)
    model.compile("sgd", "mse")
    x = np.zeros((8, *model.inputs[0].shape[1:]), "float32")
    with pytest.warns(mp.errors.LossScaleWarning, match="nothing scales the loss"):
        model.fit(x, model.predict(x, verbose=0), verbose=0, callbacks=[mp.OverflowMonitor()])


def moved(module):
    """Return the change of a kernel in a step with gradients of 2**-27."""
    # Starting at zero, where float32 holds any update.
    settings = {"use_bias": False, "kernel_initializer": "zeros"}
    model = network(module, dtype="mixed_float16", **settings)
    model.compile(
        keras.optimizers.SGD(1.0),
        lambda target, output: 2.0**-27 * keras.ops.cast(output, "float32") + 0 * target,
    )
    model.train_on_batch(np.ones((1, 4), "float32"), np.zeros((1, 2), "float32"))
    return model.get_weights()[0]


def test_an_update_that_float16_would_lose_is_applied():
    assert moved(mp).all()


@pytest.mark.full
def test_stock_keras_loses_an_update_that_float16_cannot_hold():
    assert not moved(keras).any()
