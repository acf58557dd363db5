"""Averages, decay, clipping and constraints of the inner optimizer work through the wrapper.

On the same finite gradients a wrapped optimizer equals a plain one in weights, slots, averages,
accumulators and `iterations`, and skipped steps in between change none of them. `helpers.twins`
says where the bits can be equal.
"""

import keras
import numpy as np
import pytest
from helpers.marks import few, full, full_on
from helpers.stepping import BACKEND, EXACT_WAYS, each_of, numpy, tensors, variables_of
from helpers.twins import SCALE, START, Twins, gradients

from kerasmp.optimizer import LossScaleOptimizer

every_way = each_of(EXACT_WAYS)


def sgd(rate=0.1, **settings):
    return lambda _: keras.optimizers.SGD(rate, momentum=0.9, **settings)


def adam(rate=0.1, **settings):
    return lambda _: keras.optimizers.Adam(rate, **settings)


def rmsprop(rate=0.1, **settings):
    return lambda _: keras.optimizers.RMSprop(rate, **settings)


def excluding(**which):
    """Return a factory of an optimizer whose weight decay excludes some variables."""

    def make(variables):
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.5)
        chosen = (
            {"var_list": [variables[0]]} if which["by"] == "variable" else {"var_names": ["v1"]}
        )
        optimizer.exclude_from_weight_decay(**chosen)
        return optimizer

    return make


# Optimizers with a feature, and the same without it.
FEATURES = {
    "clipnorm": (sgd(clipnorm=0.5), sgd()),
    "global_clipnorm": (sgd(global_clipnorm=0.5), sgd()),
    "clipvalue": (sgd(clipvalue=0.25), sgd()),
    "weight decay": (sgd(weight_decay=0.5), sgd()),
    "decay but for a variable": (excluding(by="variable"), sgd(weight_decay=0.5)),
    "decay but for a name": (excluding(by="name"), sgd(weight_decay=0.5)),
    "accumulation": (adam(gradient_accumulation_steps=2), adam()),
    "accumulation, clipped": (
        adam(gradient_accumulation_steps=2, global_clipnorm=0.5),
        adam(gradient_accumulation_steps=2),
    ),
    "average that overwrites": (sgd(use_ema=True, ema_overwrite_frequency=2), sgd()),
    "average, accumulation, decay and clipping": (
        adam(
            use_ema=True,
            ema_momentum=0.5,
            ema_overwrite_frequency=1,
            gradient_accumulation_steps=2,
            weight_decay=0.5,
            clipvalue=0.25,
        ),
        adam(gradient_accumulation_steps=2),
    ),
    "a callable learning rate": (sgd(lambda: 0.25), sgd(0.1)),
    "Nesterov": (sgd(nesterov=True), sgd()),
    "AMSGrad": (adam(amsgrad=True, beta_2=0.5), adam(beta_2=0.5)),
    "centred": (rmsprop(momentum=0.5, centered=True), rmsprop(momentum=0.5)),
}
# Those that run code of kerasmp; the others are only Keras's.
QUICK = ("average, accumulation, decay and clipping", "a callable learning rate")
if BACKEND != "jax":  # which compiles again for each of them
    QUICK += ("global_clipnorm", "decay but for a name", "accumulation, clipped")


def trained(make, step, **options):
    """Step a wrapped and a plain optimizer through good and, for the wrapped one, bad steps."""
    twins = Twins(make, step, **options)
    twins.bad(np.inf)
    for seed in range(5):
        twins.good(seed)
        twins.bad(np.nan)
    return twins


@every_way
@pytest.mark.parametrize("name", few(FEATURES, QUICK))
def test_a_setting_of_the_inner_optimizer_works_as_without_the_wrapper(name, step):
    with_it, without = FEATURES[name]
    twins = trained(with_it, step)
    twins.check()
    # The feature has an effect: the same steps without it give other results.
    others = variables_of(*START)
    plain = without(others)
    for seed in range(5):
        step(plain, tensors(*gradients(seed)), others)
    assert any(np.any(a != b) for a, b in zip(numpy(twins.ours), numpy(others), strict=True))


@every_way
@full_on("jax")
def test_an_average_that_overwrites_nothing_is_kept_beside_the_weights(step):
    twins = trained(sgd(use_ema=True, ema_momentum=0.5), step)
    twins.check()
    averages = numpy(twins.inner._model_variables_moving_average)
    assert all(np.any(a != w) for a, w in zip(averages, numpy(twins.ours), strict=True))


@every_way
@full_on("jax")
def test_a_constraint_acts_on_applied_steps_only(step):
    def constrain(variables):
        for variable in variables:
            variable.constraint = keras.constraints.NonNeg()

    twins = Twins(sgd(), step, prepare=constrain)
    start = numpy(twins.ours)
    assert any((value < 0).any() for value in start)
    twins.bad(np.inf)  # does not apply the constraint
    for seed in range(3):
        twins.good(seed)
        twins.bad()
    twins.check()
    assert all((value >= 0).all() for value in numpy(twins.ours))


@every_way
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
@pytest.mark.parametrize("accumulation", few([None, 2], [2]))
def test_variables_without_a_gradient_stay_and_the_others_are_updated(step, accumulation):
    twins = trained(adam(gradient_accumulation_steps=accumulation), step, missing=(0, 2))
    twins.check()
    moved = [
        np.any(now != then)
        for now, then in zip(numpy(twins.ours), numpy(variables_of(*START)), strict=True)
    ]
    assert moved == [False, True, False, True]
    assert twins.wrapped.nonfinite_counts.tolist() == [0, 6, 0, 0]


# Keras keeps the largest value of a window and of the initial 0.
@every_way
def test_a_variable_that_takes_its_gradient_as_value_takes_none_of_a_skipped_step(step):
    def overwritten(variables):
        variables[1].overwrite_with_gradient = True

    twins = trained(adam(gradient_accumulation_steps=2), step, prepare=overwritten)
    twins.check()
    given = [*(gradients(seed)[1] for seed in (2, 3)), np.zeros(2)]
    assert numpy(twins.ours)[1].tolist() == np.maximum.reduce(given).tolist()


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("scale", [0.25, 1024.0])
@pytest.mark.parametrize("settings", [{"clipnorm": 0.5}, {"global_clipnorm": 0.5}], ids=str)
def test_gradients_are_clipped_as_by_keras(settings, scale):
    """With a variable without a gradient, and one overwritten with its gradient, not clipped."""
    grads = [[3.0, 4.0], [0.3, 0.1], [5.0], [0.0]]
    ended = []
    for wrap, factor in (
        (lambda inner: inner, 1.0),
        (lambda inner: LossScaleOptimizer(inner, loss_scale=scale), scale),
    ):
        variables = variables_of(*np.ones_like([[1, 1], [1, 1]]), [1.0], [1.0], [1.0])
        variables[2].overwrite_with_gradient = True
        given = [np.array(g) * (1.0 if i == 2 else factor) for i, g in enumerate(grads)]
        optimizer = wrap(keras.optimizers.SGD(1.0, **settings))
        optimizer.apply([*tensors(*given), None], variables)
        ended.append(np.concatenate(numpy(variables)))
    np.testing.assert_allclose(ended[1], ended[0], rtol=1e-6)


def test_manually_unscaled_gradients_are_clipped_by_their_own_norm():
    variables = variables_of([0.0, 0.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0, global_clipnorm=1.0), loss_scale=8.0)
    optimizer.build(variables)
    optimizer.apply(optimizer.get_unscaled_gradients(tensors([24.0, 32.0])), variables)
    np.testing.assert_allclose(numpy(variables)[0], [-0.6, -0.8], rtol=1e-6)


def test_a_user_defined_optimizer_does_its_own_clipping():
    seen = []

    class Own(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            seen.append(self.global_clipnorm)
            super().apply(grads, trainable_variables)

    variables = variables_of([0.0])
    optimizer = LossScaleOptimizer(Own(1.0, global_clipnorm=0.5), loss_scale=2.0)
    optimizer.apply(tensors([8.0]), variables)
    assert set(seen) == {0.5}
    assert numpy(variables)[0].tolist() == [-0.5]


HUGE = [1.5e19]  # has a finite square, but two of them overflow
# Gradients of some variables, the others are 0; and which of them are blamed, by the norm of all.
NORMS = {
    "one alone": ([[1e25]], [1]),
    "two together": ([HUGE, HUGE], [1, 1]),
}


@every_way
@pytest.mark.parametrize(
    ("fused", "scale", "number"),
    [
        (True, 1.0, 9),
        full(True, 1.0, 3),  # TensorFlow checks a few one by one
        full(True, SCALE, 9),
        full(False, 1.0, 9),
    ],
)
def test_a_step_whose_clipping_norm_is_infinite_is_skipped(step, fused, scale, number):
    """The gradients are finite and their squares are not; Keras turns them into NaN or zeros."""
    variables = variables_of(*[[0.0]] * number)
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(1.0, global_clipnorm=1.0), loss_scale=scale, fused=fused
    )

    def take(*grads):
        padded = [*grads, *[[0.0]] * (number - len(grads))]
        step(optimizer, tensors(*(np.array(g) * scale for g in padded)), variables)

    counts = np.zeros(number, int)
    for grads, blamed in NORMS.values():
        take(*grads)
        counts[: len(blamed)] += blamed
        assert optimizer.nonfinite_counts.tolist() == counts.tolist()
    assert not np.any(numpy(variables))
    take([1.2e19], [1.0])  # twice its square is not finite, but nothing is added to it
    assert optimizer.applied_steps == 1
    assert numpy(variables)[0].tolist() == [-1.0]


@every_way
@pytest.mark.full
def test_a_norm_per_gradient_does_not_depend_on_the_others(step):
    variables = variables_of([0.0], [0.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0, clipnorm=1.0), loss_scale=1.0)
    step(optimizer, tensors(HUGE, HUGE), variables)
    assert [value.tolist() for value in numpy(variables)] == [[-1.0], [-1.0]]
    step(optimizer, tensors([1e25], [1.0]), variables)
    assert optimizer.nonfinite_counts.tolist() == [1, 0]
