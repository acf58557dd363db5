"""`fit` with a bad batch inserted equals `fit` without it, bit for bit."""

import keras
import numpy as np
import pytest
from helpers.networks import KINDS, X, Y

import kerasmp as mp

BACKEND = keras.backend.backend()
BATCH = 8
BAD = np.full((BATCH, X.shape[1]), np.inf, "float32")
# In the middle of the data: what comes after must not see it either.
X_WITH_BAD = np.concatenate([X[:24], BAD, X[24:]])
Y_WITH_BAD = np.concatenate([Y[:24], Y[:BATCH], Y[24:]])

WAYS = {
    "tensorflow": [
        {},
        {"jit_compile": True},
        {"steps_per_execution": 3},
        {"run_eagerly": True},
    ],
    "jax": [{}, {"steps_per_execution": 3}, {"run_eagerly": True}],
    "torch": [{}],
}[BACKEND]


def train(model, x, y, optimizer_class=mp.LossScaleOptimizer, **compile_arguments):
    optimizer = optimizer_class(keras.optimizers.Adam(0.01), **_settings(optimizer_class))
    model.compile(optimizer, loss="mse", metrics=["mae"], **compile_arguments)
    history = model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    return history.history, {
        v.path: np.array(keras.ops.convert_to_numpy(v.value)) for v in model.variables
    }


def _settings(optimizer_class):
    # A scale that stays put, so that both runs use the same one throughout.
    fixed = issubclass(optimizer_class, mp.LossScaleOptimizer)
    return {"loss_scale": 64.0} if fixed else {"initial_scale": 64.0}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_is_as_if_it_had_not_been(kind, way):
    clean_logs, clean = train(KINDS[kind](mp), X, Y, **way)
    model = KINDS[kind](mp)
    logs, weights = train(model, X_WITH_BAD, Y_WITH_BAD, **way)
    assert model.optimizer.skipped_steps == 2  # one an epoch
    assert logs == clean_logs
    values, expected = list(weights.values()), list(clean.values())
    assert any("seed" in path for path in weights)
    assert any("moving_variance" in path for path in weights)
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_in_stock_keras_the_bad_batch_stays():
    model = KINDS["sequential"](keras)
    logs, weights = train(model, X_WITH_BAD, Y_WITH_BAD, keras.optimizers.LossScaleOptimizer)
    assert np.isnan(logs["loss"]).all()
    moving = [value for path, value in weights.items() if "moving_mean" in path]
    assert not np.isfinite(moving[0]).all()
    assert not np.isfinite(model.predict(X, verbose=0)).all()


def test_our_optimizer_in_a_stock_model_saves_the_weights_and_no_more():
    model = KINDS["sequential"](keras)
    logs, weights = train(model, X_WITH_BAD, Y_WITH_BAD)
    assert np.isnan(logs["loss"]).all()
    assert all(np.isfinite(value).all() for path, value in weights.items() if "kernel" in path)


def test_an_epoch_without_a_good_step_has_nan_for_its_averages():
    model = KINDS["sequential"](mp)
    before = [np.array(weight) for weight in model.get_weights()]
    logs, _ = train(model, np.tile(BAD, (3, 1)), Y[: 3 * BATCH])
    assert np.isnan(logs["loss"]).all()
    assert np.isnan(logs["mae"]).all()
    for weight, unchanged in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, unchanged)
    # The next good epoch, and evaluation, count as always.
    history = model.fit(X, Y, verbose=0).history
    assert np.isfinite(history["loss"][0])
    assert np.isfinite(model.evaluate(X, Y, verbose=0)).all()


def test_train_on_batch_undoes_a_bad_batch_too():
    model = KINDS["functional"](mp)
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=64.0), loss="mse")
    model.train_on_batch(X[:BATCH], Y[:BATCH])
    before = [np.array(weight) for weight in model.get_weights()]
    model.train_on_batch(BAD, Y[:BATCH])
    assert model.optimizer.last_step_skipped
    for weight, unchanged in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, unchanged)


@pytest.mark.parametrize("model_class", [mp.Model, mp.Sequential, keras.Model])
def test_one_kind_of_model_does_not_change_the_classes_of_the_others(model_class):
    bases = model_class.__bases__
    for kind in [*KINDS, *reversed(KINDS)]:
        model = KINDS[kind](mp)
        assert isinstance(model, mp.Model)
        assert np.isfinite(model.predict(X[:2], verbose=0)).all()
    assert model_class.__bases__ == bases
    # A stock model of each kind is still a stock one.
    assert not any(isinstance(KINDS[kind](keras), mp.Model) for kind in KINDS)
