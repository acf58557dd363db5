"""Learning-rate schedules and callables advance with applied steps, as without the wrapper."""

import dataclasses
import gc
import weakref

import keras
import numpy as np
import pytest
from helpers.marks import few
from helpers.stepping import EXACT_WAYS, each_of, eager, numpy, tensors, variables_of
from helpers.twins import SCALE, Twins
from keras import ops
from keras.optimizers import schedules

from kerasmp.optimizer import LossScaleOptimizer

MADE = {
    "CosineDecay": lambda: schedules.CosineDecay(0.1, 4, warmup_target=0.5, warmup_steps=2),
    "CosineDecayRestarts": lambda: schedules.CosineDecayRestarts(0.1, 2),
    "ExponentialDecay": lambda: schedules.ExponentialDecay(0.1, 2, 0.5),
    "InverseTimeDecay": lambda: schedules.InverseTimeDecay(0.1, 1, 0.5),
    "PiecewiseConstantDecay": lambda: schedules.PiecewiseConstantDecay([1, 3], [0.1, 0.05, 0.01]),
    "PolynomialDecay": lambda: schedules.PolynomialDecay(0.1, 4, 0.01),
}
every_way = each_of(EXACT_WAYS)


def rate(optimizer):
    return float(ops.convert_to_numpy(ops.convert_to_tensor(optimizer.learning_rate)))


def test_every_schedule_of_keras_is_tested():
    """A new schedule fails here until it is added above."""
    found = {
        name
        for name, member in vars(schedules).items()
        if isinstance(member, type) and issubclass(member, schedules.LearningRateSchedule)
    }
    assert found == {*MADE, "LearningRateSchedule"}


@every_way
@pytest.mark.parametrize(
    ("name", "accumulation"),
    few(
        [*((name, None) for name in MADE), ("CosineDecay", 2)],
        [("CosineDecay", None), ("CosineDecay", 2)],
    ),
)
def test_a_schedule_moves_in_applied_steps_only(name, accumulation, step):
    def make(_):
        return keras.optimizers.SGD(
            MADE[name](), momentum=0.9, gradient_accumulation_steps=accumulation
        )

    twins = Twins(make, step)
    rates = []
    for seed in range(5):
        twins.good(seed)
        rates.append(rate(twins.wrapped))
        twins.bad()
        assert rate(twins.wrapped) == rates[-1] == rate(twins.plain)
    twins.check()
    assert len(set(rates)) > 2


@every_way
def test_one_schedule_object_serves_two_optimizers_each_by_its_own_count(step):
    shared = schedules.ExponentialDecay(0.1, 1, 0.5)
    one = Twins(lambda _: keras.optimizers.SGD(shared), step)
    other = Twins(lambda _: keras.optimizers.SGD(shared), step)
    one.good(0)
    one.good(1)
    other.bad()
    other.good(2)
    one.check()
    other.check()
    assert (rate(one.wrapped), rate(other.wrapped)) == pytest.approx((0.025, 0.05))


@every_way
def test_a_learning_rate_that_is_set_between_steps_is_used_from_then_on(step):
    twins = Twins(lambda _: keras.optimizers.SGD(0.1, momentum=0.9), step)
    for seed, value in enumerate((0.5, 0.25, 0.125)):
        twins.wrapped.learning_rate = value
        twins.plain.learning_rate = value
        twins.bad()
        assert rate(twins.wrapped) == value
        twins.good(seed)
    twins.check()


def test_a_learning_rate_with_a_schedule_cannot_be_set():
    with pytest.raises(TypeError, match="not settable"):
        LossScaleOptimizer(keras.optimizers.SGD(MADE["PolynomialDecay"]())).learning_rate = 0.5


class Outer(keras.optimizers.Optimizer):
    """A user-defined optimizer around another one, whose learning rate it exposes."""

    def __init__(self, inner_optimizer, name="outer"):
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.inner_optimizer.learning_rate = value


def test_the_learning_rate_of_a_wrapper_inside_the_wrapper_is_passed_on():
    inmost = keras.optimizers.SGD(1.0)
    optimizer = LossScaleOptimizer(Outer(inmost))
    assert rate(optimizer) == 1.0
    optimizer.learning_rate = 2.0
    assert rate(optimizer) == rate(inmost) == 2.0


class TestWhatChangesBetweenEagerSteps:
    """An eager step uses changes since the last one, like a plain optimizer."""

    def stepped(self, inner, change):
        """Return the update of a second step, after the change."""
        variables = variables_of([0.0])
        optimizer = LossScaleOptimizer(inner, loss_scale=SCALE, fused=False)
        eager(optimizer, tensors([0.0]), variables)
        change(optimizer)
        eager(optimizer, tensors([SCALE]), variables)
        return numpy(variables)[0].tolist()

    def test_what_a_callable_returns(self):
        rates = [1.0]
        inner = keras.optimizers.SGD(lambda: rates[0])
        assert self.stepped(inner, lambda _: rates.insert(0, 0.25)) == [-0.25]

    def test_a_setting(self):
        def clip(optimizer):
            optimizer.inner_optimizer.clipvalue = 0.5

        assert self.stepped(keras.optimizers.SGD(1.0), clip) == [-0.5]

    @pytest.mark.backend("tensorflow", "jax")  # on torch Keras's SGD has its own update
    def test_an_array_in_place_of_another(self):
        class Weighted(keras.optimizers.SGD):
            factor = np.float32(1.0)

            def update_step(self, gradient, variable, learning_rate):
                super().update_step(gradient * self.factor, variable, learning_rate)

        def weigh(optimizer):
            optimizer.inner_optimizer.factor = np.array([0.25], "float32")

        inner = Weighted(1.0)
        inner.factor = np.array([1.0], "float32")
        assert self.stepped(inner, weigh) == [-0.25]

    def test_a_schedule_in_place_of_a_number(self):
        def schedule(optimizer):
            optimizer.learning_rate = schedules.ExponentialDecay(0.5, 1, 0.5)

        assert self.stepped(keras.optimizers.SGD(1.0), schedule) == [-0.25]

    def test_a_list_that_is_changed_in_place(self):
        inner = Factors(1.0)
        assert self.stepped(inner, lambda _: inner.factors.append(0.25)) == [-0.25]

    def test_a_function_that_cannot_be_hashed(self):
        @dataclasses.dataclass
        class Rate:
            value: float

            def __call__(self):
                return self.value

        rate = Rate(1.0)
        assert self.stepped(keras.optimizers.SGD(rate), lambda _: setattr(rate, "value", 0.5)) == [
            -0.5
        ]

    @pytest.mark.parametrize("as_variable", [False, True])
    def test_a_function_is_called_once_a_step_and_is_kept(self, as_variable):
        rates = [0.25, 0.5, 1.0]

        def rate():
            return keras.Variable(rates.pop()) if as_variable else rates.pop()

        inner = keras.optimizers.SGD(rate)
        assert self.stepped(inner, lambda _: None) == [-0.5]
        assert rates == [0.25]
        assert float(ops.convert_to_numpy(inner.learning_rate)) == 0.25


class Factors(keras.optimizers.SGD):
    """A user-defined optimizer with a setting that is a list."""

    def __init__(self, rate):
        super().__init__(rate)
        self.factors = [1.0]

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.factors[-1], variable, learning_rate)


@pytest.mark.backend("jax")
class TestWhatJaxCompilesForEagerSteps:
    """A compiled program is reused and does not keep the tensors that it was compiled with."""

    def compiled(self, inner, change, steps):
        """Return the number of programs compiled after the first step; the second is skipped."""
        import jax

        found = []
        variables = variables_of([0.0])
        optimizer = LossScaleOptimizer(inner, loss_scale=SCALE, fused=False)

        def listen(event, *_, **__):
            if "backend_compile" in event:
                found.append(event)

        eager(optimizer, tensors([0.0]), variables)
        jax.monitoring.register_event_duration_secs_listener(listen)
        for i in range(steps):
            change(inner, i)
            eager(optimizer, tensors([np.inf if i == 0 else 0.0]), variables)
        jax.monitoring.clear_event_listeners()
        assert optimizer.skipped_steps == 1
        return len(found)

    def test_a_function_with_another_rate_at_each_step_needs_one_program(self):
        rates = iter([0.5, 0.25, 0.125, 0.0625])
        inner = keras.optimizers.SGD(lambda: next(rates))
        assert self.compiled(inner, lambda *_: None, 3) == 0

    def test_settings_that_take_turns_need_one_program_each(self):
        def clip(inner, i):
            inner.clipvalue = (1.0, 2.0)[i % 2]

        once = self.compiled(keras.optimizers.SGD(1.0), clip, 2)
        assert self.compiled(keras.optimizers.SGD(1.0), clip, 6) == once > 0

    def test_a_program_does_not_keep_the_gradients_that_it_was_compiled_with(self):
        variables = variables_of([0.0])
        optimizer = LossScaleOptimizer("sgd")
        gradient = tensors([1.0])[0]
        alive = weakref.ref(gradient)
        eager(optimizer, [gradient], variables)
        del gradient
        gc.collect()
        assert alive() is None
