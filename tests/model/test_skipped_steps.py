"""`fit` with inserted bad batches equals `fit` without them, bit for bit."""

import keras
import numpy as np
import pytest
from helpers.marks import few
from helpers.networks import KINDS, X, Y

import kerasmp as mp

BACKEND = keras.backend.backend()
BATCH = 8
BAD = np.full((BATCH, X.shape[1]), np.inf, "float32")
# At the start, where Keras makes the variables of metrics; two in a row, in the middle; at the
# end, where the logs are those of the epoch. Later steps must not see them either.
PLACES = [0, 24, 24, 64]
X_WITH_BAD, Y_WITH_BAD = X, Y
for place in reversed(PLACES):
    X_WITH_BAD = np.concatenate([X_WITH_BAD[:place], BAD, X_WITH_BAD[place:]])
    Y_WITH_BAD = np.concatenate([Y_WITH_BAD[:place], Y[:BATCH], Y_WITH_BAD[place:]])

GRAPH = {}
WAYS = {
    "tensorflow": [
        GRAPH,
        {"jit_compile": True},  # XLA compiles for 17 s
        {"steps_per_execution": 3},
        {"run_eagerly": True},
    ],
    "jax": [GRAPH, {"steps_per_execution": 3}, {"run_eagerly": True}],
    "torch": [GRAPH],
}[BACKEND]
# The quick set runs each way but XLA, and each kind of class: kerasmp's, a user's, and both.
QUICK = {
    "tensorflow": [
        ("subclassed", GRAPH),
        ("functional_subclass", {"steps_per_execution": 3}),
        ("sequential", {"run_eagerly": True}),
    ],
    "jax": [("subclassed", GRAPH), ("functional", {"steps_per_execution": 3})],
    "torch": [(kind, GRAPH) for kind in KINDS],
}[BACKEND]
CASES = few([(kind, way) for kind in KINDS for way in WAYS], QUICK)


def train(model, x, y, optimizer_class=mp.LossScaleOptimizer, **compile_arguments):
    optimizer = optimizer_class(keras.optimizers.Adam(0.01), **_settings(optimizer_class))
    metrics = ["mae", keras.metrics.MeanSquaredError(name="other")]
    model.compile(optimizer, loss="mse", metrics=metrics, **compile_arguments)
    history = model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    return history.history, {
        v.path: np.array(keras.ops.convert_to_numpy(v.value)) for v in model.variables
    }


def _settings(optimizer_class):
    # A constant scale, so that both runs use the same one.
    fixed = issubclass(optimizer_class, mp.LossScaleOptimizer)
    return {"loss_scale": 64.0} if fixed else {"initial_scale": 64.0}


@pytest.mark.parametrize(("kind", "way"), CASES, ids=str)
def test_a_skipped_step_leaves_no_trace(kind, way):
    clean_logs, clean = train(KINDS[kind](mp), X, Y, **way)
    model = KINDS[kind](mp)
    logs, weights = train(model, X_WITH_BAD, Y_WITH_BAD, **way)
    assert model.optimizer.skipped_steps == 2 * len(PLACES)  # of two epochs
    assert logs == clean_logs
    values, expected = list(weights.values()), list(clean.values())
    assert any("seed" in path for path in weights)
    assert any("moving_variance" in path for path in weights)
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.full
def test_in_stock_keras_a_bad_batch_leaves_traces():
    model = KINDS["sequential"](keras)
    logs, weights = train(model, X_WITH_BAD, Y_WITH_BAD, keras.optimizers.LossScaleOptimizer)
    assert np.isnan(logs["loss"]).all()
    moving = [value for path, value in weights.items() if "moving_mean" in path]
    assert not np.isfinite(moving[0]).all()
    assert not np.isfinite(model.predict(X, verbose=0)).all()


@pytest.mark.full
def test_the_kerasmp_optimizer_in_a_stock_model_protects_only_the_weights():
    model = KINDS["sequential"](keras)
    logs, weights = train(model, X_WITH_BAD, Y_WITH_BAD)
    assert np.isnan(logs["loss"]).all()
    assert all(np.isfinite(value).all() for path, value in weights.items() if "kernel" in path)


def test_an_epoch_of_nothing_but_bad_data_is_not_finite_and_changes_nothing():
    model = KINDS["sequential"](mp)
    before = [np.array(weight) for weight in model.get_weights()]
    logs, _ = train(model, np.tile(BAD, (3, 1)), Y[: 3 * BATCH])
    assert np.isnan(logs["loss"]).all()
    assert np.isnan(logs["mae"]).all()
    for weight, unchanged in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, unchanged)
    # The next good epoch and evaluation count as usual.
    history = model.fit(X, Y, batch_size=BATCH, verbose=0).history
    assert np.isfinite(history["loss"][0])
    assert np.isfinite(model.evaluate(X, Y, batch_size=BATCH, verbose=0)).all()


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights:UserWarning")
def test_a_frozen_model_trains_nothing_and_still_runs():
    model = KINDS["functional"](mp)
    model.trainable = False
    model.compile(mp.LossScaleOptimizer("adam", loss_scale=64.0), loss="mse")
    before = [np.array(weight) for weight in model.get_weights()]
    logs = model.fit(X, Y, batch_size=BATCH, verbose=0).history
    assert np.isfinite(logs["loss"][0])
    assert model.optimizer.skipped_steps == 0
    for weight, unchanged in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, unchanged)


def test_frozen_layers_below_are_left_alone_and_the_head_learns():
    model = KINDS["functional"](mp)
    for layer in model.layers[:-1]:
        layer.trainable = False
    model.compile(mp.LossScaleOptimizer("adam", loss_scale=64.0), loss="mse")
    before = {v.path: np.array(keras.ops.convert_to_numpy(v.value)) for v in model.weights}
    model.fit(np.concatenate([X, BAD]), np.concatenate([Y, Y[:BATCH]]), batch_size=BATCH, verbose=0)
    head = {v.path for v in model.layers[-1].weights}
    for v in model.weights:
        same = np.array_equal(before[v.path], keras.ops.convert_to_numpy(v.value))
        assert same is (v.path not in head) or "seed" in v.path
    assert model.optimizer.nonfinite_counts.shape == (len(head),)


def test_making_models_does_not_change_the_classes_of_others():
    classes = [mp.Model, mp.Sequential, keras.Model]
    bases = [each.__bases__ for each in classes]
    for kind in [*KINDS, *reversed(KINDS)]:
        model = KINDS[kind](mp)
        assert isinstance(model, mp.Model)
        assert np.isfinite(keras.ops.convert_to_numpy(model(X[:2]))).all()
    assert [each.__bases__ for each in classes] == bases
    # A stock model of each kind stays a stock model.
    assert not any(isinstance(KINDS[kind](keras), mp.Model) for kind in KINDS)
