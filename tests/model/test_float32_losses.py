"""Losses and metrics get float32, and extra losses are float32: fault 23."""

import keras
import numpy as np
import pytest
from helpers.float16 import numpy_of
from helpers.marks import full, full_on
from keras import ops

import kerasmp as mp

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
BACKEND = keras.backend.backend()
LOW = ["mixed_float16", full("mixed_bfloat16")]


class AddsLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


def with_added_loss(module, dtype):
    dense = keras.layers.Dense(2, dtype=dtype)
    return module.Sequential([keras.Input((4,)), dense, AddsLoss(dtype=dtype)])


def with_regularizer(module, dtype, factor=0.01):
    regularizer = keras.regularizers.L2(factor)
    dense = keras.layers.Dense(2, dtype=dtype, activity_regularizer=regularizer)
    return module.Sequential([keras.Input((4,)), dense])


def with_regularizing_layer(module, dtype):
    inner = keras.Sequential([keras.layers.ActivityRegularization(l2=0.01, dtype=dtype)])
    return module.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype=dtype), inner])


BUILDS = [with_added_loss, with_regularizer, with_regularizing_layer]
every_build = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)


@every_build
@pytest.mark.parametrize("dtype", LOW)
def test_extra_losses_are_float32_and_fit_runs(build, dtype):
    model = build(mp, dtype)
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=64.0), "mse")
    assert np.isfinite(model.fit(X, X[:, :2], verbose=0).history["loss"][0])
    model(X)
    assert {keras.backend.standardize_dtype(loss.dtype) for loss in model.losses} == {"float32"}


@pytest.mark.full
@pytest.mark.backend("tensorflow")
@every_build
def test_extra_losses_of_two_dtypes_are_a_type_error_in_stock_keras(build):
    model = build(keras, "mixed_float16")
    model.compile("sgd", "mse")
    with pytest.raises((TypeError, ValueError), match="float16"):
        model.fit(X, X[:, :2], verbose=0)


def _loss_of(module, dtype):
    keras.utils.set_random_seed(0)
    model = with_regularizer(module, dtype, factor=1e-6)
    model.layers[0].set_weights([np.full((4, 2), 100, "float32"), np.zeros(2, "float32")])
    model.compile("sgd", None)
    return model.evaluate(np.ones((16, 4), "float32"), None, verbose=0)


def test_a_sum_beyond_float16_is_finite_and_correct():
    # 32 outputs of 400: 5,120,000 in all, 320,000 a row. Keras 3.12 does not divide by the rows.
    wanted = _loss_of(keras, "float32")
    assert wanted > 0.3
    np.testing.assert_allclose(_loss_of(mp, "mixed_float16"), wanted, rtol=1e-3)


@pytest.mark.full
def test_a_sum_beyond_float16_is_not_finite_in_stock_keras():
    assert not np.isfinite(_loss_of(keras, "mixed_float16"))


def own_penalty(outputs):
    return 0.01 * ops.sum(ops.square(outputs))


@pytest.mark.parametrize("given", [keras.regularizers.L2(0.01), own_penalty])
def test_layers_return_and_save_the_regularizer_that_they_were_given(given):
    dense = keras.layers.Dense(2, dtype="mixed_float16", activity_regularizer=given)
    config = dense.get_config()
    model = mp.Sequential([keras.Input((4,)), dense])
    model(X)
    assert isinstance(dense.activity_regularizer, type(given))
    assert dense.activity_regularizer == given
    assert dense.get_config() == config


def test_a_factor_that_is_changed_later_is_used():
    model = with_regularizer(mp, "mixed_float16")
    model(X)
    before = numpy_of(model.losses[0])
    model.layers[0].activity_regularizer.l2 *= 2
    model(X)
    np.testing.assert_allclose(numpy_of(model.losses[0]), 2 * before, rtol=1e-5)


def two_outputs(module, containers):
    inputs = keras.Input((4,))
    outputs = [keras.layers.Dense(2, dtype="mixed_float16", name=name)(inputs) for name in "ab"]
    return module.Model(inputs, containers(outputs))


def as_dict(outputs):
    return dict(zip("ab", outputs, strict=True))


@full_on("jax")
@pytest.mark.parametrize("containers", [full(list), as_dict])
def test_losses_and_metrics_of_several_outputs_see_float32(containers):
    seen = []

    def watch(y_true, y_pred):
        seen.append(keras.backend.standardize_dtype(y_pred.dtype))
        return ops.mean(ops.square(y_true - y_pred), axis=-1)

    class Watching(keras.losses.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):  # before Keras casts
            seen.append(keras.backend.standardize_dtype(y_pred.dtype))
            return super().__call__(y_true, y_pred, sample_weight)

        def call(self, y_true, y_pred):
            return ops.mean(ops.square(y_true - y_pred), axis=-1)

    model = two_outputs(mp, containers)
    losses = containers([Watching(), Watching()])
    model.compile("sgd", losses, metrics=containers([[watch], [watch]]))
    y = containers([X[:, :2], X[:, 2:]])
    model.fit(X, y, verbose=0)
    model.evaluate(X, y, verbose=0)
    assert set(seen) == {"float32"}


@full_on("jax")
@pytest.mark.parametrize("module", [pytest.param(mp, id="ours"), full(keras, id="stock")])
def test_user_defined_compute_loss_and_compute_metrics_see_float32(module):
    seen = set()

    class Own(module.Sequential):
        def compute_loss(self, _x, y, y_pred, _sample_weight):
            seen.add(keras.backend.standardize_dtype(y_pred.dtype))
            return ops.mean(ops.square(ops.cast(y, y_pred.dtype) - y_pred))

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            seen.add(keras.backend.standardize_dtype(y_pred.dtype))
            return super().compute_metrics(x, y, y_pred, sample_weight)

    model = Own([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    model.compile("sgd", "mse")
    model.fit(X, X[:, :2], verbose=0)
    model.evaluate(X, X[:, :2], verbose=0)
    assert ("float16" in seen) is (module is keras)


def masked(module, dtype):
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(1, dtype=dtype)
    return module.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(5, 2, mask_zero=True), dense]
    )


@pytest.mark.keras("3.14.0")
def test_the_mask_of_an_output_still_reaches_loss_and_metrics():
    ids = np.array([[1, 2, 0], [3, 0, 0]])
    y = np.ones((2, 3, 1), "float32")
    results = []
    for module, dtype in ((keras, "float32"), (mp, "mixed_float16")):
        model = masked(module, dtype)
        model.compile("sgd", "mse", weighted_metrics=["mae"])
        results.append(model.evaluate(ids, y, verbose=0))
    np.testing.assert_allclose(results[1], results[0], rtol=2e-3)
    everywhere = masked(keras, "float32").predict(ids, verbose=0)
    assert abs(np.mean(np.square(everywhere - y)) - results[0][0]) > 1e-3  # the mask matters
