"""`Model.from_keras` adopts a stock model in place: weights, state and compilation stay."""

import keras
import numpy as np
import pytest
from helpers.marks import full, full_on
from helpers.networks import KINDS, X, Y
from helpers.train_steps import OwnStep

import kerasmp as mp

BATCH = 8
BAD = np.full((BATCH, X.shape[1]), np.inf, "float32")
Stock = keras.optimizers.LossScaleOptimizer


def values(variables):
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in variables]


def trained(kind, optimizer):
    model = KINDS[kind](keras)
    model.compile(optimizer, "mse", metrics=["mae"])
    model.fit(X[:16], Y[:16], batch_size=BATCH, shuffle=False, verbose=0)
    return model


@full_on("jax")
@pytest.mark.parametrize(
    "kind",
    [
        "sequential",
        full("functional_subclass"),
        full("subclassed"),
    ],
)
def test_a_bad_batch_leaves_no_trace_in_an_adopted_model(kind):
    stock = trained(kind, mp.LossScaleOptimizer("adam", loss_scale=64.0))
    weights, its_class, optimizer = values(stock.variables), type(stock), stock.optimizer
    model = mp.Model.from_keras(stock)
    assert model is stock
    assert isinstance(model, mp.Model)
    assert isinstance(model, its_class) or its_class in {keras.Sequential, keras.Model}
    assert isinstance(model, mp.Sequential) is isinstance(model, keras.Sequential)
    assert model.optimizer is optimizer
    for value, before in zip(values(model.variables), weights, strict=True):
        np.testing.assert_array_equal(value, before)
    before = values([*model.trainable_variables, *model.non_trainable_variables])
    model.fit(BAD, Y[:BATCH], batch_size=BATCH, verbose=0)
    assert model.optimizer.skipped_steps == 1
    after = values([*model.trainable_variables, *model.non_trainable_variables])
    for value, wanted in zip(after, before, strict=True):
        np.testing.assert_array_equal(value, wanted)


@full_on("jax")
@pytest.mark.parametrize("kind", [full("sequential"), "functional"])
def test_a_plain_optimizer_is_wrapped_with_its_state_and_the_model_loads_as_kerasmp(kind, tmp_path):
    model = trained(kind, keras.optimizers.Adam(0.01))
    adam, state = model.optimizer, values(model.optimizer.variables)
    mp.Model.from_keras(model)
    assert model.optimizer.inner_optimizer is adam
    for value, before in zip(values(adam.variables), state, strict=True):
        np.testing.assert_array_equal(value, before)
    model.fit(X, Y, batch_size=BATCH, verbose=0)
    assert int(keras.ops.convert_to_numpy(adam.iterations)) > 2
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert isinstance(loaded.optimizer, mp.LossScaleOptimizer)
    np.testing.assert_array_equal(
        values(loaded.optimizer.variables)[0], values(model.optimizer.variables)[0]
    )
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (loaded(X), model(X))))


@keras.saving.register_keras_serializable(package="tests", name="Users")
class Users(keras.Model):
    def __init__(self, units=2, **settings):
        super().__init__(**settings)
        self.units = units
        self.dense = keras.layers.Dense(units, dtype="mixed_float16")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests", name="UsersOther")
class UsersOther(Users):
    def answer(self):
        return 42


@full_on("jax")
def test_models_of_user_classes_load_as_kerasmp_models_of_those_classes(tmp_path):
    for cls in (Users, UsersOther):
        model = cls(2)
        model.build((None, 4))
        model.compile("adam", "mse")
        model = mp.Model.from_keras(model)
        model.fit(X, Y, verbose=0)
        model.save(tmp_path / f"{cls.__name__}.keras")
        for other in (Users(2), mp.Model.from_keras(UsersOther(2))):
            assert isinstance(other, Users)  # their classes stay as they were
    assert Users.__bases__ == (keras.Model,)
    for cls in (Users, UsersOther):
        loaded = keras.models.load_model(tmp_path / f"{cls.__name__}.keras")
        assert isinstance(loaded, cls)
        assert isinstance(loaded, mp.Model)
        assert isinstance(loaded.optimizer, mp.LossScaleOptimizer)
        assert loaded.optimizer.applied_steps + loaded.optimizer.skipped_steps == 2
        assert keras.saving.get_registered_name(type(loaded)) == "kerasmp>Turned"
    assert loaded.answer() == 42


def test_a_stock_wrapper_is_replaced_and_its_scale_kept():
    stock = Stock(keras.optimizers.Adam(0.01), initial_scale=64.0, dynamic_growth_steps=2)
    model = trained("functional", stock)
    assert float(keras.ops.convert_to_numpy(stock.dynamic_scale)) == 128.0
    mp.Model.from_keras(model)
    ours = model.optimizer
    assert isinstance(ours, mp.LossScaleOptimizer)
    assert ours.inner_optimizer is stock.inner_optimizer
    assert ours.loss_scale == 128.0
    assert int(keras.ops.convert_to_numpy(ours.step_counter)) == 0
    assert (ours.schedule.initial_scale, ours.schedule.growth_interval) == (64.0, 2)


def test_auto_scale_loss_false_leaves_the_optimizer_alone():
    model, adam = KINDS["functional"](keras), keras.optimizers.Adam(0.01)
    model.compile(adam, "mse")
    mp.Model.from_keras(model, auto_scale_loss=False)
    model.fit(X, Y, verbose=0)
    assert model.optimizer is adam


def test_a_user_defined_train_step_is_guarded():
    class Own(OwnStep, keras.Sequential):
        pass

    layers = [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    model = Own(layers)
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=64.0), "mse")
    mp.Model.from_keras(model)
    model.fit(BAD, Y[:BATCH], verbose=0)
    assert model.optimizer.skipped_steps == 1
    assert all(np.isfinite(value).all() for value in values(model.non_trainable_variables))


def test_a_from_config_on_a_single_model_is_left_alone():
    model = KINDS["sequential"](mp)
    model.compile("sgd", "mse")
    model.from_config = trained
    model.make_train_function()
    assert model.from_config is trained


def test_unbuilt_and_uncompiled_models_are_adopted_and_a_second_call_does_nothing():
    model = mp.Model.from_keras(keras.Sequential([keras.layers.Dense(2, dtype="mixed_float16")]))
    assert mp.Model.from_keras(model) is model
    assert type(model) is mp.Sequential
    model.compile("adam", "mse")
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"][0])
