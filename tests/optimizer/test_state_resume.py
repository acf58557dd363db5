"""Interrupted training continues bit for bit, in every format."""

import copy
import pickle

import keras
import numpy as np
import pytest
from helpers import resuming
from helpers.marks import few, full_on
from helpers.resuming import END, STOP, compiled, everything, train
from helpers.stepping import BACKEND, assert_same_bits

from kerasmp.errors import LossScaleWarning


def keras_file(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def weights_file(model, folder):
    model.save_weights(folder / "model.weights.h5")
    fresh = compiled()
    fresh.load_weights(folder / "model.weights.h5")
    return fresh


def legacy_h5(model, folder):
    # This way of saving removes the optimizer from the config that Keras saves next: use a copy.
    # Keras builds each optimizer of such a file without variables: its state comes as a list.
    pickle.loads(pickle.dumps(model)).save(folder / "model.h5")
    loaded = keras.models.load_model(folder / "model.h5", compile=False)
    optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    loaded.compile(optimizer, model.loss)
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.optimizer.set_weights(model.optimizer.get_weights())
    return loaded


def pickled(model, _):
    return pickle.loads(pickle.dumps(model))


def deepcopied(model, _):
    return copy.deepcopy(model)


def lists(model, _):
    fresh = compiled()
    fresh.set_weights(model.get_weights())
    fresh.optimizer.set_weights(model.optimizer.get_weights())
    return fresh


def model_checkpoint(model, folder):
    callback = keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras")
    callback.set_model(model)
    callback.on_epoch_end(0, {})
    return keras.models.load_model(folder / "1.keras")


def checkpoint(model, folder):
    import tensorflow as tf

    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "point")
    fresh = compiled()
    status = tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer).restore(path)
    status.assert_existing_objects_matched()
    return fresh


def checkpoint_before_build(model, folder):
    import tensorflow as tf

    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "point")
    fresh = compiled()
    optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    fresh.compile(optimizer, fresh.loss)
    tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer).restore(path)
    return fresh


def checkpoint_manager(model, folder):
    import tensorflow as tf

    whole = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    tf.train.CheckpointManager(whole, folder, max_to_keep=2).save()
    fresh = compiled()
    whole = tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer)
    tf.train.CheckpointManager(whole, folder, max_to_keep=2).restore_or_initialize()
    return fresh


WAYS = [keras_file, weights_file, legacy_h5, pickled, deepcopied, lists, model_checkpoint]
# The others run no other code of kerasmp.
QUICK = [keras_file, weights_file, pickled, lists]
if BACKEND == "tensorflow":
    WAYS += [checkpoint, checkpoint_before_build, checkpoint_manager]
    QUICK += [checkpoint, checkpoint_before_build]


@pytest.fixture(scope="module")
def uninterrupted():
    return everything(train(compiled(), 0, END))


@pytest.fixture(scope="module")
def stopped():
    model = train(compiled(), 0, STOP)
    optimizer = model.optimizer
    assert (optimizer.applied_steps, optimizer.skipped_steps, optimizer.loss_scale) == (4, 2, 512.0)
    counters = optimizer.step_counter, optimizer.hysteresis_left, optimizer.iterations
    assert [int(keras.ops.convert_to_numpy(v.value)) for v in counters] == [1, 0, 4]
    return model


@pytest.mark.parametrize("way", few(WAYS, QUICK), ids=lambda way: way.__name__)
def test_training_continues_bit_for_bit(way, stopped, uninterrupted, tmp_path):
    resumed = way(stopped, tmp_path)
    assert resumed is not stopped
    assert_same_bits(everything(train(resumed, STOP, END)), uninterrupted)


@full_on("jax", "torch")
def test_training_continues_bit_for_bit_in_another_process(
    stopped, uninterrupted, tmp_path, another_process
):
    path = tmp_path / "model.keras"
    stopped.save(path)
    end = another_process("helpers.resuming:go_on", path=str(path))
    assert_same_bits([np.asarray(value, dtype) for dtype, value in end], uninterrupted)


@pytest.mark.full
@pytest.mark.backend("tensorflow")
def test_training_with_xla_continues_bit_for_bit(tmp_path):
    resumed = keras_file(train(compiled(jit_compile=True), 0, STOP), tmp_path)
    whole = train(compiled(jit_compile=True), 0, END)
    assert_same_bits(everything(train(resumed, STOP, END)), everything(whole))


class Crash(keras.callbacks.Callback):
    """Raises in the middle of the third epoch."""

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002 - as Keras calls it
        if self.epoch == 2 and batch == 4:
            raise KeyboardInterrupt

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002
        self.epoch = epoch


def _fit(model, *callbacks):
    return model.fit(
        resuming.X,
        resuming.Y,
        batch_size=8,
        epochs=4,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def test_a_crashed_fit_continues_from_its_backup_bit_for_bit(tmp_path):
    whole = compiled()
    losses = _fit(whole).history["loss"]
    with pytest.raises(KeyboardInterrupt):
        _fit(compiled(), keras.callbacks.BackupAndRestore(tmp_path / "backup"), Crash())
    resumed = compiled()
    rest = _fit(resumed, keras.callbacks.BackupAndRestore(tmp_path / "backup")).history["loss"]
    assert rest == losses[2:]
    assert_same_bits(everything(resumed), everything(whole))
    assert resumed.optimizer.skipped_steps >= 8  # and those of a scale that grew too far


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_optimizer_keeps_its_settings_and_warns_that_its_state_is_lost(copied, stopped):
    """As with a plain one, which has no variables before `build`."""
    with pytest.warns(UserWarning, match="optimizer is not built|Skipping variable") as caught:
        twin = copied(stopped.optimizer)
    assert sum(w.category is LossScaleWarning for w in caught) == 1
    assert twin.get_config() == stopped.optimizer.get_config()
    fresh = compiled()
    twin.build(fresh.trainable_variables)
    twin.set_weights(stopped.optimizer.get_weights())
    assert_same_bits(twin.get_weights(), stopped.optimizer.get_weights())


@pytest.mark.backend("jax")
def test_an_optimizer_with_compiled_steps_and_an_unscaled_mark_is_copied():
    """State besides variables belongs to this process and must not prevent a copy."""
    model = compiled()
    grads = [keras.ops.ones(v.shape) for v in model.trainable_variables]
    model.optimizer.apply(grads, model.trainable_variables)
    model.optimizer.get_unscaled_gradients(grads)
    twin = pickle.loads(pickle.dumps(model))
    assert_same_bits(everything(twin), everything(model))
    twin.optimizer.get_unscaled_gradients(grads)
