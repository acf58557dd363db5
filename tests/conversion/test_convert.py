"""Conversion of built models: in place, with their weights, and back."""

import gc

import keras
import numpy as np
import pytest
from helpers.converted import attention, functional, sequential, subclassed
from helpers.flattened import flatten_layers
from helpers.marks import few, full_on
from keras import ops

import kerasmp as mp
from kerasmp.conversion import order

JAX = keras.backend.backend() == "jax"
layers = keras.layers
X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")


@pytest.mark.parametrize("build", few([functional, subclassed], [functional], where=JAX))
def test_weights_are_kept_and_restore_brings_the_model_back(build):
    model = build()
    before, weights = model.predict(X, verbose=0), model.get_weights()
    policies = [layer.dtype_policy for layer in flatten_layers(model)]
    report = mp.convert(model)
    half = model.predict(X, verbose=0)
    assert {v.dtype for v in model.variables if "seed" not in v.path} == {"float32"}
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(half, before)  # the compiled step is a new one
    np.testing.assert_allclose(half.astype("float32"), before, rtol=0.05, atol=0.02)
    assert "float16" in {layer.compute_dtype for layer in flatten_layers(model)}
    report.restore()
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    assert [layer.dtype_policy for layer in flatten_layers(model)] == policies


def test_conversions_are_undone_once_and_in_reverse_order():
    model = sequential()
    model.compile("adam", "mse")
    adam = model.optimizer
    first = mp.convert(model)
    second = mp.convert(model)  # of the same name: their numbers tell them apart
    inner = mp.convert(model.layers[0], "mixed_bfloat16")
    dry = mp.convert(model, "float32", dry_run=True)
    for early in (first, second):
        with pytest.raises(
            mp.errors.PolicyError, match=r'first restore\(\) of conversion 1 of "dense'
        ):
            early.restore()
    inner.restore()
    with pytest.raises(mp.errors.PolicyError, match=r"\) of conversion 1 .*\) of conversion 2 of"):
        first.restore()
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    second.restore()
    with pytest.raises(mp.errors.PolicyError, match=r"undone already.* conversion 2 of"):
        second.restore()
    for _ in range(2):
        dry.restore()
    assert model.layers[0].compute_dtype == "float16"
    first.restore()
    assert model.optimizer is adam
    assert {layer.compute_dtype for layer in flatten_layers(model)} == {"float32"}


def test_a_dropped_report_of_a_later_conversion_still_blocks_an_earlier_one():
    model = sequential()
    first = mp.convert(model)
    mp.convert(model, "mixed_bfloat16")
    with pytest.raises(mp.errors.PolicyError, match=r'to "mixed_bfloat16".*If that report is gone'):
        first.restore()
    assert model.layers[0].compute_dtype == "bfloat16"


def test_test_and_train_steps_follow_too():
    model = sequential()
    model.compile(mp.LossScaleOptimizer(keras.optimizers.SGD(0.0)), "mse")
    y = np.zeros((8, 3), "float32")
    losses = [model.evaluate(X, y, verbose=0)]
    report = mp.convert(model)
    losses.append(model.evaluate(X, y, verbose=0))
    assert losses[0] != losses[1]
    model.fit(X, y, verbose=0)
    assert model.layers[0].compute_dtype == "float16"
    report.restore()
    assert model.train_function is None


def test_nested_models_drop_their_compiled_steps():
    model = functional()
    inner = next(layer for layer in model.layers if isinstance(layer, keras.Sequential))
    before = inner.predict(X, verbose=0)
    assert before.dtype == np.float32
    mp.convert(model)
    assert inner.predict(X, verbose=0).dtype == np.float16
    assert inner.outputs[0].dtype == "float16"


@pytest.mark.parametrize("given", [True, False])
def test_statistics_of_normalization_stay_exact(given):
    mean, variance = [1000.3, 1e-9], [1e6, 1e-8]
    x = np.array([[1001.0, 2e-4], [2000.0, -1e-4]], "float32")
    layer = layers.Normalization(mean=mean, variance=variance) if given else layers.Normalization()
    model = keras.Sequential([keras.Input((2,)), layer, layers.ReLU(), layers.ReLU()])
    if not given:
        layer.adapt(x)
    exact = keras.ops.convert_to_numpy(layer(x))
    with np.errstate(over="ignore"):
        broken = mp.convert(model, rules=None)
        safe = mp.convert(model, rules="safe")
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x)), exact)
        safe.restore()
        broken.restore()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x)), exact)


@full_on("jax")
def test_kerasmp_models_wrap_their_optimizer_and_follow_the_output_dtype():
    model = mp.Sequential(sequential().layers)
    model(X)
    model.compile("sgd", "mse")
    report = mp.convert(model, "compute=float16,output=float32", rules=None)
    model.fit(X, np.zeros((8, 3)), verbose=0)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert model.predict(X, verbose=0).dtype == np.float32
    report.restore()
    assert model.predict(X, verbose=0).dtype == np.float32


def norm(x):
    return mp.ops.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("function", [norm, mp.ops.in_float32(lambda x: ops.sum(x, -1))])
def test_ops_in_a_functional_model_follow(function, tmp_path):
    inputs = keras.Input((4,))
    dense = keras.layers.Dense(250, kernel_initializer="ones", dtype="float32")
    model = keras.Model(inputs, function(dense(inputs)))
    x = np.full((1, 4), 30, "float32")  # 250 outputs of 120: the sum of their squares is 3.6e6
    wanted = ops.convert_to_numpy(model(x)).item()
    mp.convert(model, "mixed_float16", rules=None)
    found = model(x)
    assert keras.backend.standardize_dtype(found.dtype) == model.outputs[0].dtype == "float16"
    np.testing.assert_allclose(ops.convert_to_numpy(found).item(), wanted, rtol=1e-3)
    mp.convert(model, "float32")
    assert keras.backend.standardize_dtype(model(x).dtype) == model.outputs[0].dtype == "float32"
    if function is norm:
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (loaded(x), model(x))))


@full_on("jax")
def test_parts_of_wrappers_and_of_cells_follow():
    inputs = keras.Input((6, 4))
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(inputs)
    x = layers.RNN([layers.GRUCell(2), layers.LSTMCell(2)])(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    before = keras.ops.convert_to_numpy(model(X[:1]))
    report = mp.convert(model)
    assert {layer.compute_dtype for layer in flatten_layers(model)[1:-1]} == {"float16", "float32"}
    assert all(p.compute_dtype == "float16" for p in flatten_layers(model) if "cell" in p.name)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(X[:1])), before, atol=1e-2)
    report.restore()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(X[:1])), before)


def test_clones_keep_the_policies_of_layers_and_not_of_their_parts():
    model = attention()
    mp.convert(model)
    clone = keras.models.clone_model(model)
    assert [x.dtype_policy for x in clone.layers] == [x.dtype_policy for x in model.layers]
    policies = [str(mp.LayerPolicies.of(each)).split()[2::3] for each in (clone, model)]
    assert policies[0] != policies[1]
    mp.convert(clone, mp.LayerPolicies.of(model))
    assert [x.compute_dtype for x in flatten_layers(clone)] == [
        x.compute_dtype for x in flatten_layers(model)
    ]


def test_records_of_a_dropped_model_are_freed():
    before = len(order._ACTIVE)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    mp.convert(model)
    assert len(order._ACTIVE) > before
    del model
    gc.collect()
    assert len(order._ACTIVE) <= before
