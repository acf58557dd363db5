"""Wherever the bad batch stands, also where the model was never built or cannot be trained."""

import keras
import numpy as np
import pytest
from helpers.networks import KINDS, X, Y

import kerasmp as mp

BATCH = 8
BAD = np.full((BATCH, X.shape[1]), np.inf, "float32")
WAYS = {
    "tensorflow": [{}, {"steps_per_execution": 2}, {"run_eagerly": True}],
    "jax": [{}, {"steps_per_execution": 2}],
    "torch": [{}],
}[keras.backend.backend()]
PLACES = {"first": [0], "last": [64], "two in a row": [24, 24], "first and last": [0, 64]}


def _train(x, y, **way):
    model = KINDS["subclassed"](mp)
    # Accumulators of these metrics are made in the first step that Keras sees.
    model.compile(
        mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=64.0),
        loss="mse",
        metrics=["mae", keras.metrics.MeanSquaredError(name="other")],
        **way,
    )
    logs = model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0).history
    return model, logs, [np.array(keras.ops.convert_to_numpy(v.value)) for v in model.variables]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_the_run_equals_the_one_without_it(places, way):
    x, y = X, Y
    for place in reversed(places):
        x = np.concatenate([x[:place], BAD, x[place:]])
        y = np.concatenate([y[:place], Y[:BATCH], y[place:]])
    _, clean_logs, clean = _train(X, Y, **way)
    model, logs, values = _train(x, y, **way)
    assert model.optimizer.skipped_steps == 2 * len(places)
    assert logs == clean_logs
    for value, wanted in zip(values, clean, strict=True):
        np.testing.assert_array_equal(value, wanted)


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
