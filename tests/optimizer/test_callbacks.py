"""Keras's callbacks in a run with skipped batches act as in a plain run without those batches.

`kerasmp.Model` keeps skipped batches out of the metrics that callbacks look at, so both runs must
agree in every log and every weight.
"""

import keras
import numpy as np
import pytest
from helpers.marks import full_on, marks_on
from helpers.stepping import assert_same_bits, numpy

import kerasmp as mp

pytestmark = marks_on("oldest")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 4)).astype("float32")
Y = X[:, :1] * 2 - 1
VALIDATION = (RNG.normal(size=(8, 4)).astype("float32"), RNG.normal(size=(8, 1)).astype("float32"))
BAD = np.full((8, 4), np.inf, "float32")
# The first batch and one in the middle are bad.
X_WITH_BAD = np.concatenate([BAD, X[:16], BAD, X[16:]])
Y_WITH_BAD = np.concatenate([Y[:8], Y[:16], Y[:8], Y[16:]])
EPOCHS = 4


def network(module):
    keras.utils.set_random_seed(0)
    return module.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    )


def adam():
    return keras.optimizers.Adam(0.05)


def wrapped():
    return mp.LossScaleOptimizer(adam(), loss_scale=2.0**12, fused=False)


def fit(model, x, y, callbacks, epochs=EPOCHS):
    return model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=VALIDATION,
        callbacks=callbacks,
    )


def both(callback, x=X_WITH_BAD, y=Y_WITH_BAD):
    """Fit a plain model, and a wrapped one to whose data bad batches were added."""
    plain = network(keras)
    plain.compile(adam(), "mse")
    ours = network(mp)
    ours.compile(wrapped(), "mse")
    expected, got = callback(), callback()  # one, or a list
    expected_logs = fit(plain, X, Y, expected).history
    logs = fit(ours, x, y, got).history
    assert ours.optimizer.skipped_steps == 2 * len(logs["loss"])
    assert logs == expected_logs
    assert_same_bits(numpy(ours.variables), numpy(plain.variables))
    assert_same_bits(
        numpy(ours.optimizer.inner_optimizer.variables), numpy(plain.optimizer.variables)
    )
    return logs, got, ours


@full_on("jax")
def test_learning_rate_scheduler_and_terminate_on_nan():
    def halved(epoch, rate):
        return rate if epoch < 2 else rate / 2

    # TerminateOnNaN must not stop the run at skipped batches. Good batches come first: before the
    # first one of an epoch the logged loss is NaN, which stops it.
    logs, _, model = both(
        lambda: [
            keras.callbacks.LearningRateScheduler(halved),
            keras.callbacks.TerminateOnNaN(),
        ],
        *(np.roll(data, -len(BAD), axis=0) for data in (X_WITH_BAD, Y_WITH_BAD)),
    )
    assert not model.stop_training
    assert logs["learning_rate"] == pytest.approx([0.05, 0.05, 0.025, 0.0125])


@pytest.mark.full
def test_reduce_lr_on_plateau():
    logs, _, _ = both(
        lambda: keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100.0)
    )
    assert logs["learning_rate"][-1] < logs["learning_rate"][0]


@pytest.mark.full
def test_early_stopping_brings_the_best_weights_back():
    # No epoch is better by 100 than the first one.
    logs, callback, model = both(
        lambda: keras.callbacks.EarlyStopping(
            "val_loss", min_delta=100.0, patience=2, restore_best_weights=True
        )
    )
    assert (len(logs["loss"]), callback.best_epoch) == (3, 0)
    once = network(keras)
    once.compile(adam(), "mse")
    fit(once, X, Y, [], epochs=1)
    assert_same_bits(model.get_weights(), once.get_weights())


@pytest.mark.full
def test_early_stopping_stops_the_run_in_stock_keras():
    """Fault 8."""
    model = network(keras)
    model.compile(keras.optimizers.LossScaleOptimizer(adam()), "mse")
    fit(model, X_WITH_BAD, Y_WITH_BAD, [keras.callbacks.TerminateOnNaN()])
    assert model.stop_training


@pytest.mark.full
def test_model_checkpoint_saves_what_a_plain_run_saves_and_a_new_model_continues(tmp_path):
    paths = iter([tmp_path / "plain.keras", tmp_path / "ours.keras"])
    _, _, model = both(
        lambda: keras.callbacks.ModelCheckpoint(next(paths), "loss", save_best_only=True)
    )
    plain = keras.models.load_model(tmp_path / "plain.keras")
    ours = keras.models.load_model(tmp_path / "ours.keras")
    assert_same_bits(ours.get_weights(), plain.get_weights())
    assert_same_bits(numpy(ours.optimizer.variables), numpy(model.optimizer.variables))
    for going_on, x, y in ((plain, X, Y), (ours, X_WITH_BAD, Y_WITH_BAD)):
        fit(going_on, x, y, [], epochs=1)
    assert_same_bits(ours.get_weights(), plain.get_weights())


@pytest.mark.full
@pytest.mark.backend("tensorflow")  # Keras's TensorBoard writes through TensorFlow
def test_tensorboard_writes_the_learning_rate_and_the_steps_of_a_plain_run(tmp_path):
    import tensorflow as tf

    paths = iter(["plain", "ours"])
    both(lambda: keras.callbacks.TensorBoard(tmp_path / next(paths), update_freq=1))

    def written(name):
        (path,) = (tmp_path / name / "train").glob("events*")
        return [
            (value.tag, event.step, float(tf.make_ndarray(value.tensor)))
            for event in tf.compat.v1.train.summary_iterator(str(path))
            for value in event.summary.value
            if value.tag in {"epoch_loss", "epoch_learning_rate"}
        ]

    assert written("ours") == written("plain")
    assert {tag for tag, _, _ in written("ours")} == {"epoch_loss", "epoch_learning_rate"}


@pytest.mark.full
def test_one_wrapped_optimizer_goes_from_one_fit_into_the_next():
    ours, plain = network(mp), network(keras)
    ours.compile(wrapped(), "mse")
    plain.compile(adam(), "mse")
    for _ in range(2):
        fit(ours, X_WITH_BAD, Y_WITH_BAD, [], epochs=1)
        fit(plain, X, Y, [], epochs=1)
    ours.compile(ours.optimizer, "mae")  # another loss, the same optimizer and its state
    plain.compile(plain.optimizer, "mae")
    fit(ours, X_WITH_BAD, Y_WITH_BAD, [], epochs=1)
    fit(plain, X, Y, [], epochs=1)
    assert_same_bits(numpy(ours.variables), numpy(plain.variables))
    assert (ours.optimizer.applied_steps, ours.optimizer.skipped_steps) == (12, 6)
