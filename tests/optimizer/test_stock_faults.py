"""What goes wrong in stock Keras: each scenario fails there, and holds here.

A scenario is one function of the optimizer's class, so that both run the very same thing.
"""

import keras
import numpy as np
import pytest
from helpers.stepping import Stock, assert_same_bits, numpy, step_of, tensors, variables_of
from keras import ops

import kerasmp as mp
from kerasmp.errors import LossScaleError, LossScaleWarning
from kerasmp.optimizer import LossScaleOptimizer as Ours

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = X[:, :1] * 2 - 1


def steps(optimizer, variables, gradient, count):
    step = step_of(optimizer)
    for _ in range(count):
        step(optimizer, tensors([gradient, gradient]), variables)


def current_scale(optimizer):
    return float(ops.convert_to_numpy(optimizer.dynamic_scale.value))


def bad_steps_then_a_good_one(cls, count):
    """Return the scale after `count` bad steps, and the weights after one good step more."""
    variables = variables_of([1.0, 2.0])
    optimizer = cls(keras.optimizers.SGD(0.5))
    steps(optimizer, variables, np.nan, count)
    sunk = current_scale(optimizer)
    steps(optimizer, variables, 0.0, 1)
    return sunk, numpy(variables)[0]


class TestTheScaleSinks:
    COUNT = 170  # float32 halves from 2**15 to exactly 0 in fewer

    def test_stock_reaches_zero_and_destroys_the_weights(self):
        scale, weights = bad_steps_then_a_good_one(Stock, self.COUNT)
        assert scale == 0.0
        assert np.isnan(weights).all()

    def test_ours_stops_at_the_floor_and_the_weights_stay(self):
        scale, weights = bad_steps_then_a_good_one(Ours, self.COUNT)
        assert scale == 1.0
        np.testing.assert_array_equal(weights, [1.0, 2.0])


def grown(cls, count):
    """Return the scale after `count` good steps, each of which makes it grow."""
    variables = variables_of([1.0, 2.0])
    optimizer = cls(keras.optimizers.SGD(0.0), initial_scale=2.0**15, dynamic_growth_steps=1)
    steps(optimizer, variables, 0.0, count)
    high = current_scale(optimizer)
    steps(optimizer, variables, np.inf, 1)
    return high, current_scale(optimizer)


class TestTheScaleClimbs:
    def test_stock_reaches_infinity_and_stays_there(self):
        assert grown(Stock, 115) == (np.inf, np.inf)

    def test_ours_stops_at_the_ceiling_and_comes_down_from_it(self):
        assert grown(Ours, 115) == (2.0**24, 2.0**23)


def fixed_scale_through_fit(cls):
    """Train at a fixed scale with one batch that overflows; return the model."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(cls(keras.optimizers.SGD(0.01), dynamic=False, initial_scale=256.0), "mse")
    x = X.copy()
    x[20] = np.inf
    model.fit(x, Y, batch_size=8, verbose=0)
    return model


class TestAFixedScale:
    def test_stock_has_none(self):
        with pytest.raises(ValueError, match="no longer supports"):
            fixed_scale_through_fit(Stock)

    def test_what_stock_proposes_instead_lets_an_overflow_destroy_the_weights(self):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01, loss_scale_factor=256.0), "mse")
        x = X.copy()
        x[20] = np.inf
        model.fit(x, Y, batch_size=8, verbose=0)
        assert not np.isfinite(model.get_weights()[0]).all()

    def test_under_mixed_float16_stock_swaps_even_that_for_a_dynamic_scale(self):
        """Fault 10. Silently: a warning would fail the test."""
        with mp.policy_scope("mixed_float16"):
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01, loss_scale_factor=256.0), "mse")
        assert type(model.optimizer) is Stock
        assert model.optimizer.inner_optimizer.loss_scale_factor is None
        assert float(model.optimizer.scale_loss(ops.array(1.0))) == 32768.0

    def test_ours_says_so_and_what_to_write(self):
        with mp.policy_scope("mixed_float16"):
            model = mp.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        with pytest.warns(LossScaleWarning, match=r"pass loss_scale=256\.0 here"):
            model.compile(keras.optimizers.SGD(0.01, loss_scale_factor=256.0), "mse")
        model.compile(Ours(keras.optimizers.SGD(0.01), loss_scale=256.0), "mse")
        assert model.optimizer.schedule == mp.FixedLossScale(256.0)

    def test_ours_checks_and_skips_and_stays_where_it_is(self):
        model = fixed_scale_through_fit(Ours)
        assert np.isfinite(model.get_weights()[0]).all()
        assert model.optimizer.skipped_steps == 1
        assert model.optimizer.applied_steps == 7
        assert model.optimizer.loss_scale == 256.0


def averaged_through_fit(cls, bad_epochs, good_epochs):
    """Train with averaged weights; return the weights before and after."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(cls(keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.5)), "mse")
    before = model.get_weights()
    model.fit(np.full_like(X, np.nan), Y, batch_size=32, epochs=bad_epochs, verbose=0)
    if good_epochs:
        model.fit(X, Y, batch_size=32, epochs=good_epochs, shuffle=False, verbose=0)
    return before, model.get_weights()


class TestAveragesThatWereNeverUpdated:
    def test_stock_overwrites_the_weights_with_zeros(self):
        _, after = averaged_through_fit(Stock, 1, 0)
        assert not np.any(after[0])

    def test_ours_leaves_the_weights(self):
        before, after = averaged_through_fit(Ours, 1, 0)
        np.testing.assert_array_equal(before[0], after[0])

    def test_ours_writes_averages_once_there_are_some(self):
        _, after = averaged_through_fit(Ours, 1, 2)
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.5), "mse")
        model.fit(X, Y, batch_size=32, epochs=2, shuffle=False, verbose=0)
        np.testing.assert_array_equal(after[0], model.get_weights()[0])


class TestAWrapperAroundAWrapper:
    def test_stock_shrinks_the_update_by_the_scale(self):
        inner = Stock(keras.optimizers.SGD(1.0))
        outer = Stock(inner)
        variables = variables_of([0.0, 0.0])
        gradient = float(ops.convert_to_numpy(outer.scale_loss(ops.array(1.0))))
        steps(outer, variables, gradient, 1)
        np.testing.assert_allclose(numpy(variables)[0], -1 / 32768)

    @pytest.mark.parametrize("cls", [Stock, Ours])
    def test_ours_refuses(self, cls):
        with pytest.raises(LossScaleError, match=r"inner_optimizer") as caught:
            Ours(cls(keras.optimizers.SGD(1.0)))
        assert "scales the loss already" in str(caught.value)


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
    def test_stock_accepts(self, arguments):
        optimizer = Stock(keras.optimizers.SGD(), **arguments)
        ((name, value),) = arguments.items()
        np.testing.assert_equal(getattr(optimizer, name), value)

    @pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=str)
    def test_ours_names_the_value_and_what_is_allowed(self, arguments):
        with pytest.raises(LossScaleError) as caught:
            Ours(keras.optimizers.SGD(), **arguments)
        (value,) = arguments.values()
        assert repr(value) in str(caught.value)
        assert caught.value.expected
        assert caught.value.fix

    def test_a_name_is_an_attribute_error_in_stock_and_an_optimizer_here(self):
        with pytest.raises(AttributeError):
            Stock("adam")
        assert isinstance(Ours("adam").inner_optimizer, keras.optimizers.Adam)

    def test_a_name_of_no_optimizer_says_so(self):
        with pytest.raises(LossScaleError, match="adamm"):
            Ours("adamm")

    def test_something_else_is_a_type_error(self):
        with pytest.raises(mp.errors.ArgumentTypeError, match="no optimizer"):
            Ours(3)


def logs_of_a_bad_start(cls, callbacks):
    """Train from a scale that overflows; return the History's entries and the optimizer."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_float16")])
    optimizer = cls(keras.optimizers.SGD(0.01), initial_scale=2.0**24)
    model.compile(optimizer, "mse")
    return model.fit(X, Y, batch_size=8, verbose=0, callbacks=callbacks).history, optimizer


class TestASkippedStepIsVisible:
    def test_in_stock_keras_the_history_holds_nothing_but_the_loss(self):
        logs, optimizer = logs_of_a_bad_start(Stock, [])
        assert int(ops.convert_to_numpy(ops.convert_to_tensor(optimizer.iterations))) < 8
        assert set(logs) == {"loss"}

    @pytest.mark.filterwarnings("ignore:Before the first step")  # of the float16 head
    def test_here_it_is_in_the_logs_and_on_the_optimizer(self):
        logs, optimizer = logs_of_a_bad_start(Ours, [mp.OverflowMonitor()])
        assert optimizer.skipped_steps > 0
        assert logs["skipped_steps"] == [optimizer.skipped_steps]
        assert logs["loss_scale"] == [optimizer.loss_scale]
        assert optimizer.skipped_steps + optimizer.applied_steps == 8


class TestNoGradientsAtAll:
    """Fault 21: to a plain optimizer they are nothing to do."""

    @staticmethod
    def built(optimizer):
        variables = variables_of([1.0])
        optimizer.build(variables)
        return optimizer, variables

    @pytest.mark.backend("tensorflow", "torch")
    def test_stock_counts_them_as_a_good_step(self):
        optimizer, _ = self.built(Stock(keras.optimizers.SGD(0.5)))
        optimizer.apply([], [])
        assert int(ops.convert_to_numpy(optimizer.step_counter.value)) == 1

    @pytest.mark.backend("jax")
    def test_stock_leaks_a_tracer(self):
        optimizer, _ = self.built(Stock(keras.optimizers.SGD(0.5)))
        with pytest.raises(Exception, match="tracer"):
            optimizer.apply([], [])

    def test_a_plain_one_and_ours_change_nothing(self):
        for optimizer in (keras.optimizers.Adam(0.5), Ours(keras.optimizers.Adam(0.5))):
            _, variables = self.built(optimizer)
            before = numpy([*variables, *optimizer.variables])
            assert optimizer.apply([], []) is None
            assert_same_bits(numpy([*variables, *optimizer.variables]), before)
