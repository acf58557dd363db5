"""State from elsewhere: files of stock Keras, of a plain optimizer, copies, raw weights."""

import copy
import pickle

import keras
import numpy as np
import pytest
from helpers.marks import by_name
from helpers.stepping import (
    Stock,
    assert_same_bits,
    eager,
    numpy,
    tensors,
    variables_of,
)
from keras import ops

from kerasmp.errors import LossScaleWarning
from kerasmp.loss_scale import DynamicLossScale
from kerasmp.optimizer import LossScaleOptimizer

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X[:, :1]


def _plain():
    return keras.optimizers.Adam(0.01)


def _compiled(optimizer):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def _saved(optimizer, path):
    model = _compiled(optimizer)
    model.fit(X, Y, batch_size=8, verbose=0)
    model.save(path)
    return model


def test_a_stock_wrapped_model_file_brings_scale_counter_and_inner_state(tmp_path):
    path = tmp_path / "stock.keras"
    stock = _saved(Stock(_plain(), initial_scale=512.0), path).optimizer
    ours = _compiled(LossScaleOptimizer(_plain()))
    ours.load_weights(path)
    assert ours.optimizer.loss_scale == 512.0
    assert int(ops.convert_to_tensor(ours.optimizer.step_counter)) == 4
    inner = ours.optimizer.inner_optimizer
    assert_same_bits(numpy(inner.variables), numpy(stock.inner_optimizer.variables))


def test_a_plain_optimizers_state_goes_to_the_inner_optimizer(tmp_path):
    """Fault 16."""
    path = tmp_path / "plain.keras"
    plain = _saved(_plain(), path).optimizer
    ours = _compiled(LossScaleOptimizer(_plain()))
    ours.load_weights(path)
    assert int(ops.convert_to_tensor(ours.optimizer.iterations)) == 4
    assert_same_bits(numpy(ours.optimizer.inner_optimizer.variables), numpy(plain.variables))
    assert ours.optimizer.loss_scale == 2.0**15


SAVED = {
    "plain": _plain,
    "stock": lambda: Stock(_plain()),
    "ours": lambda: LossScaleOptimizer("adam"),
}


@pytest.mark.parametrize("make", by_name(SAVED, ["plain", "ours"]))
def test_an_optimizer_that_is_not_built_warns_and_stays_fresh(make, tmp_path):
    path = tmp_path / "model.keras"
    _saved(make(), path)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(LossScaleOptimizer("adam"), "mse")
    with pytest.warns(LossScaleWarning, match=r"Call build\(model.trainable_variables\) first"):
        model.load_weights(path)
    model.fit(X, Y, batch_size=8, verbose=0)
    assert model.optimizer.applied_steps == 4


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_an_optimizer_that_is_not_built_can_be_copied(copied):
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(0.25), loss_scale=DynamicLossScale(8.0, growth_interval=3), name="mine"
    )
    twin = copied(optimizer)
    assert twin is not optimizer
    assert twin.inner_optimizer is not optimizer.inner_optimizer
    assert twin.get_config() == optimizer.get_config()
    variables = variables_of([1.0])
    eager(twin, tensors([8.0]), variables)
    assert numpy(variables)[0].tolist() == [0.75]


def test_entries_that_a_foreign_state_lacks_start_anew():
    variables = variables_of([1.0])
    store = {}
    stock = Stock(keras.optimizers.SGD())
    stock.build(variables)
    stock.save_own_variables(store)
    ours = LossScaleOptimizer("sgd")
    ours.build(variables)
    ours.recover_to.assign(-64.0)
    ours.load_own_variables(store)
    assert float(ops.convert_to_numpy(ours.recover_to.value)) == 0.0


def test_a_file_from_another_schedule_loads_what_both_have():
    variables = variables_of([1.0])
    fixed = LossScaleOptimizer("sgd", loss_scale=64.0)
    fixed.build(variables)
    store = {}
    fixed.save_own_variables(store)
    dynamic = LossScaleOptimizer("sgd", loss_scale=DynamicLossScale(hysteresis=3))
    dynamic.build(variables)
    dynamic.load_own_variables(store)
    assert dynamic.loss_scale == 64.0
    assert int(ops.convert_to_tensor(dynamic.hysteresis_left)) == 3


def test_a_file_without_a_recovery_state_loads():
    """Its config lacks the setting, and its state has no entry for it."""
    before = LossScaleOptimizer("sgd", loss_scale=DynamicLossScale(64.0, recovery_interval=None))
    variables = variables_of([1.0])
    eager(before, tensors([64.0]), variables)
    config, store = before.get_config(), {}
    del config["loss_scale"]["config"]["recovery_interval"]
    before.save_own_variables(store)
    assert "recover_to" not in store
    loaded = LossScaleOptimizer.from_config(config)
    loaded.build(variables)
    loaded.load_own_variables(store)
    assert loaded.schedule == DynamicLossScale(64.0)
    assert (loaded.loss_scale, loaded.applied_steps) == (64.0, 1)
    assert float(ops.convert_to_numpy(loaded.recover_to.value)) == 0.0


@pytest.mark.backend("tensorflow")
def test_a_checkpoint_without_a_recovery_state_restores(tmp_path):
    import tensorflow as tf

    before = LossScaleOptimizer("adam", loss_scale=DynamicLossScale(64.0, recovery_interval=None))
    variables = variables_of([1.0])
    eager(before, tensors([64.0]), variables)
    path = tf.train.Checkpoint(optimizer=before).save(tmp_path / "point")
    loaded = LossScaleOptimizer("adam", loss_scale=DynamicLossScale(8.0))
    loaded.build(variables)
    tf.train.Checkpoint(optimizer=loaded).restore(path)
    assert (loaded.loss_scale, loaded.applied_steps, int(loaded.iterations)) == (64.0, 1, 1)
    assert_same_bits(
        numpy(loaded.inner_optimizer.variables), numpy(before.inner_optimizer.variables)
    )
    assert float(ops.convert_to_numpy(loaded.recover_to.value)) == 0.0
