"""Files of an earlier version load with all their state; see old_files/."""

import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers.marks import full, full_on

import kerasmp as mp

FOLDER = Path(__file__).parent / "old_files"
_spec = importlib.util.spec_from_file_location("made_before", FOLDER / "make.py")
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def assert_as_saved(model, name):
    """Assert the saved variables and predictions; then train and skip a step."""
    with np.load(FOLDER / f"{name}.npz") as kept:
        predictions = kept["predictions"]
        wanted = [kept[f"arr_{i}"] for i in range(len(kept.files) - 1)]
    found = [*model.get_weights(), *map(keras.ops.convert_to_numpy, model.optimizer.variables)]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    # Other frameworks, and later versions of layers, round differently.
    np.testing.assert_allclose(model.predict(made.X, verbose=0), predictions, atol=2e-3)
    applied, skipped = model.optimizer.applied_steps, model.optimizer.skipped_steps
    assert min(applied, skipped) >= 2
    model.train_on_batch(made.X, made.Y)
    model.train_on_batch(made.BAD, made.Y)
    assert (model.optimizer.applied_steps, model.optimizer.skipped_steps) == (
        applied + 1,
        skipped + 1,
    )


@full_on("jax")
@pytest.mark.keras("3.15")  # the version that wrote them: older ones lack some arguments
@pytest.mark.parametrize("name", ["adam", full("company"), full("converted")])
def test_a_model_file_loads(name):
    model = keras.models.load_model(FOLDER / f"{name}.keras")
    assert isinstance(model, mp.Model)
    assert type(model.layers[-1]).__module__.startswith("kerasmp")
    assert_as_saved(model, name)


@pytest.mark.full
def test_a_weights_file_loads():
    model = made.MODELS["adam"]()
    model.optimizer.build(model.trainable_variables)
    model.load_weights(FOLDER / "adam.weights.h5")
    assert_as_saved(model, "adam")


@pytest.mark.full
@pytest.mark.backend("tensorflow")
def test_a_checkpoint_restores():
    import tensorflow as tf

    model = made.MODELS["adam"]()
    model.optimizer.build(model.trainable_variables)
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    saved.read(str(FOLDER / "checkpoint")).assert_consumed()
    assert_as_saved(model, "adam")
