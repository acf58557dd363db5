"""Faults of stock Keras: while these tests pass, this package is needed.

That it does not go wrong here is said where the rest is said of the same thing.
"""

import keras
import numpy as np
import pytest
from helpers.stepping import Stock, numpy, step_of, tensors, variables_of
from keras import ops

import kerasmp as mp

pytestmark = pytest.mark.full

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = X[:, :1] * 2 - 1


def steps(optimizer, variables, gradient, count):
    step = step_of(optimizer)
    for _ in range(count):
        step(optimizer, tensors([gradient, gradient]), variables)


def current_scale(optimizer):
    return float(ops.convert_to_numpy(optimizer.dynamic_scale.value))


def test_a_falling_scale_reaches_zero_and_destroys_the_weights():
    variables = variables_of([1.0, 2.0])
    optimizer = Stock(keras.optimizers.SGD(0.5))
    steps(optimizer, variables, np.nan, 170)  # float32 halves from 2**15 to exactly 0 in fewer
    assert current_scale(optimizer) == 0.0
    steps(optimizer, variables, 0.0, 1)
    assert np.isnan(numpy(variables)[0]).all()


def test_a_growing_scale_reaches_infinity_and_stays_there():
    variables = variables_of([1.0, 2.0])
    optimizer = Stock(keras.optimizers.SGD(0.0), initial_scale=2.0**15, dynamic_growth_steps=1)
    steps(optimizer, variables, 0.0, 115)
    assert current_scale(optimizer) == np.inf
    steps(optimizer, variables, np.inf, 1)
    assert current_scale(optimizer) == np.inf


class TestAFixedScale:
    def test_stock_keras_has_none(self):
        with pytest.raises(ValueError, match="no longer supports"):
            Stock(keras.optimizers.SGD(0.01), dynamic=False, initial_scale=256.0)

    def test_the_alternative_of_stock_keras_lets_an_overflow_destroy_the_weights(self):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01, loss_scale_factor=256.0), "mse")
        x = X.copy()
        x[20] = np.inf
        model.fit(x, Y, batch_size=8, verbose=0)
        assert not np.isfinite(model.get_weights()[0]).all()

    def test_under_mixed_float16_stock_keras_replaces_it_by_a_dynamic_scale(self):
        """Fault 10. Silently: a warning would fail the test."""
        with mp.policy_scope("mixed_float16"):
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01, loss_scale_factor=256.0), "mse")
        assert type(model.optimizer) is Stock
        assert model.optimizer.inner_optimizer.loss_scale_factor is None
        assert float(model.optimizer.scale_loss(ops.array(1.0))) == 32768.0


def test_averages_that_were_never_updated_overwrite_the_weights_with_zeros():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(Stock(keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.5)), "mse")
    model.fit(np.full_like(X, np.nan), Y, batch_size=32, verbose=0)
    assert not np.any(model.get_weights()[0])


def test_a_wrapper_around_a_wrapper_divides_the_update_by_the_scale():
    inner = Stock(keras.optimizers.SGD(1.0))
    outer = Stock(inner)
    variables = variables_of([0.0, 0.0])
    gradient = float(ops.convert_to_numpy(outer.scale_loss(ops.array(1.0))))
    steps(outer, variables, gradient, 1)
    np.testing.assert_allclose(numpy(variables)[0], -1 / 32768)


BAD_ARGUMENTS = [
    {"initial_scale": 0.0},
    {"initial_scale": -1.0},
    {"initial_scale": np.inf},
    {"initial_scale": np.nan},
    {"dynamic_growth_steps": 0},
    {"dynamic_growth_steps": -1},
    {"dynamic_growth_steps": 2.5},
]


class TestBadArguments:
    @pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=str)
    def test_stock_keras_accepts(self, arguments):
        optimizer = Stock(keras.optimizers.SGD(), **arguments)
        ((name, value),) = arguments.items()
        np.testing.assert_equal(getattr(optimizer, name), value)

    def test_a_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError):
            Stock("adam")


def test_the_history_of_a_run_with_skipped_steps_holds_only_the_loss():
    """From a scale that overflows."""
    head = keras.layers.Dense(1, dtype="mixed_float16")
    model = keras.Sequential([keras.Input((4,)), head])
    optimizer = Stock(keras.optimizers.SGD(0.01), initial_scale=2.0**24)
    model.compile(optimizer, "mse")
    logs = model.fit(X, Y, batch_size=8, verbose=0).history
    assert int(ops.convert_to_numpy(ops.convert_to_tensor(optimizer.iterations))) < 8
    assert set(logs) == {"loss"}


class TestNoGradientsAtAll:
    """Fault 21: a plain optimizer does nothing with them."""

    @staticmethod
    def built(optimizer):
        variables = variables_of([1.0])
        optimizer.build(variables)
        return optimizer, variables

    @pytest.mark.backend("tensorflow", "torch")
    def test_stock_keras_counts_them_as_a_good_step(self):
        optimizer, _ = self.built(Stock(keras.optimizers.SGD(0.5)))
        optimizer.apply([], [])
        assert int(ops.convert_to_numpy(optimizer.step_counter.value)) == 1

    @pytest.mark.backend("jax")
    def test_stock_keras_leaks_a_tracer(self):
        optimizer, _ = self.built(Stock(keras.optimizers.SGD(0.5)))
        with pytest.raises(Exception, match="tracer"):
            optimizer.apply([], [])
