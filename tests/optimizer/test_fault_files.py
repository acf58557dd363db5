"""Faults 12, 13 and 16: state that stock Keras loses in files, or between two optimizers.

The policy that is global while a file is loaded, and `auto_scale_loss`, must not matter; and the
state of a plain optimizer moves into a wrapped one and back through files, with one call each way.
"""

import keras
import numpy as np
import pytest
from helpers.marks import by_name
from helpers.stepping import Stock, assert_same_bits, numpy
from keras import ops

import kerasmp as mp

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X[:, :1]
LOST = "ignore:Skipping variable loading for optimizer:UserWarning"


def network(module):
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(4, activation="tanh")
    return module.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(1)])


def fit(model):
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    return model


def steps(optimizer):
    return int(ops.convert_to_numpy(ops.convert_to_tensor(optimizer.iterations)))


def is_plain(optimizer):
    """Return whether it is an Adam, for example that of torch, and not a wrapper."""
    return isinstance(optimizer, keras.optimizers.Adam) and not isinstance(optimizer, Stock)


def saved_under_float16(path, module, optimizer, **compiling):
    """Train under a global mixed_float16, save and return the model; reset the global policy."""
    with mp.policy_scope("mixed_float16"):
        model = network(module)
        model.compile(optimizer, keras.losses.MeanSquaredError(), **compiling)
        fit(model).save(path)
    assert keras.config.dtype_policy().name == "float32"
    return model


# What a user of kerasmp writes: a kerasmp model and a name, or the wrapper in either model.
OURS = {
    "our model": (mp, lambda: "adam"),
    "our optimizer": (mp, lambda: mp.LossScaleOptimizer("adam", loss_scale=2.0**7)),
    "our optimizer in a stock model": (keras, lambda: mp.LossScaleOptimizer("adam")),
}


class TestLoadedUnderAnotherPolicy:
    @pytest.mark.full
    @pytest.mark.filterwarnings(LOST)
    def test_stock_keras_loses_wrapper_and_state_and_keeps_float16(self, tmp_path):
        """Fault 12."""
        model = saved_under_float16(tmp_path / "model.keras", keras, "adam")
        assert type(model.optimizer) is Stock
        assert steps(model.optimizer) > 0
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert is_plain(loaded.optimizer)
        assert steps(loaded.optimizer) == 0
        assert loaded.layers[0].compute_dtype == "float16"

    @pytest.mark.parametrize(("module", "optimizer"), by_name(OURS, ["our model"]))
    def test_kerasmp_continues_bit_for_bit(self, module, optimizer, tmp_path):
        model = saved_under_float16(tmp_path / "model.keras", module, optimizer())
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.optimizer.schedule == model.optimizer.schedule
        assert [layer.compute_dtype for layer in loaded.layers] == ["float16"] * 2
        assert steps(loaded.optimizer) == model.optimizer.applied_steps > 0
        for going_on in (model, loaded):
            fit(going_on)
        assert_same_bits(numpy(loaded.variables), numpy(model.variables))
        assert_same_bits(numpy(loaded.optimizer.variables), numpy(model.optimizer.variables))


class TestAutoScaleLoss:
    """Fault 13: the policy is the same at loading, and the optimizer should not change."""

    def loaded(self, module, path):
        model = saved_under_float16(path, module, "adam", auto_scale_loss=False)
        assert is_plain(model.optimizer)
        with mp.policy_scope("mixed_float16"):
            return model.optimizer, keras.models.load_model(path).optimizer

    @pytest.mark.full
    @pytest.mark.filterwarnings(LOST)
    def test_stock_keras_wraps_what_it_loads_and_loses_its_state(self, tmp_path):
        _, loaded = self.loaded(keras, tmp_path / "model.keras")
        assert type(loaded) is Stock
        assert steps(loaded) == 0

    def test_kerasmp_loads_it_unchanged(self, tmp_path):
        optimizer, loaded = self.loaded(mp, tmp_path / "model.keras")
        assert is_plain(loaded)
        assert steps(loaded) == 4
        assert_same_bits(numpy(loaded.variables), numpy(optimizer.variables))


def compiled(optimizer):
    model = network(keras)
    model.compile(optimizer, keras.losses.MeanSquaredError())
    return model


def wrapped(optimizer):
    return mp.LossScaleOptimizer(optimizer, loss_scale=2.0**10, fused=False)


class TestMovingBetweenPlainAndWrapped:
    """Fault 16."""

    def test_a_run_through_two_files_equals_a_plain_run_that_never_stopped(self, tmp_path):
        straight = compiled("adam")
        for _ in range(3):
            fit(straight)
        first = fit(compiled("adam"))
        first.save(tmp_path / "plain.keras")
        second = keras.models.load_model(tmp_path / "plain.keras")
        second.compile(wrapped(second.optimizer), second.loss)  # the call, one way
        fit(second).save(tmp_path / "wrapped.keras")
        third = keras.models.load_model(tmp_path / "wrapped.keras")
        assert third.optimizer.applied_steps == 4
        third.compile(third.optimizer.inner_optimizer, third.loss)  # and back
        fit(third)
        assert is_plain(third.optimizer)
        assert steps(third.optimizer) == 12
        assert_same_bits(numpy(third.variables), numpy(straight.variables))
        assert_same_bits(numpy(third.optimizer.variables), numpy(straight.optimizer.variables))

    @pytest.mark.full
    @pytest.mark.filterwarnings(LOST)
    @pytest.mark.parametrize("inwards", [True, False], ids=["into", "out of"])
    def test_files_in_stock_keras_lose_the_state_either_way(self, inwards, tmp_path):
        def stock():
            return Stock(keras.optimizers.Adam())

        source, target = (keras.optimizers.Adam, stock) if inwards else (stock, "adam")
        fit(compiled(source())).save(tmp_path / "source.keras")
        model = compiled(target() if callable(target) else target)
        model.optimizer.build(model.trainable_variables)
        model.load_weights(tmp_path / "source.keras")
        assert steps(model.optimizer) == 0
