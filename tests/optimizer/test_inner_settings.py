"""Fault 18: settings of the inner optimizer on the wrapper are passed on or refused, never lost."""

import keras
import pytest
from helpers.stepping import (
    WAYS,
    Stock,
    assert_same_bits,
    each_of,
    eager,
    numpy,
    step_of,
    tensors,
    variables_of,
)

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import FixedLossScale
from kerasmp.optimizer import LossScaleOptimizer

SETTINGS = {
    "weight_decay": 0.5,
    "clipnorm": 0.5,
    "global_clipnorm": 0.5,
    "clipvalue": 0.5,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize(("name", "value"), SETTINGS.items(), ids=SETTINGS)
def test_a_setting_that_no_step_would_read_is_refused(name, value):
    optimizer = LossScaleOptimizer("sgd")
    told = rf"`{name}`.*Expected: optimizer\.inner_optimizer\.{name} = "
    with pytest.raises(LossScaleError, match=told):
        setattr(optimizer, name, value)


@pytest.mark.full
@pytest.mark.parametrize(("name", "value"), SETTINGS.items(), ids=SETTINGS)
def test_a_setting_on_the_wrapper_is_lost_in_stock_keras(name, value):
    stock = Stock(keras.optimizers.SGD())
    setattr(stock, name, value)  # has no effect
    assert getattr(stock.inner_optimizer, name) != value


def test_loss_scale_factor_on_the_wrapper_is_refused_with_a_hint():
    """On the inner optimizer it would make updates silently tiny."""
    optimizer = LossScaleOptimizer("sgd")
    with pytest.raises(LossScaleError, match=r"Expected: LossScaleOptimizer\(.*loss_scale=8\.0"):
        optimizer.loss_scale_factor = 8.0


@each_of(WAYS)
def test_a_scale_on_the_inner_optimizer_is_refused_before_anything_changes(step):
    variables = variables_of([1.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=8.0)
    optimizer.build(variables)
    optimizer.inner_optimizer.loss_scale_factor = 8.0
    before = numpy([*variables, *optimizer.variables])
    # While tracing, AutoGraph changes the type of errors.
    with pytest.raises(Exception, match=r"loss_scale_factor = 8\.0\. Expected: None"):
        step(optimizer, tensors([8.0]), variables)
    assert_same_bits(numpy([*variables, *optimizer.variables]), before)
    optimizer.inner_optimizer.loss_scale_factor = None
    step(optimizer, tensors([8.0]), variables)
    assert numpy(variables)[0].tolist() == [0.0]


@pytest.mark.keras("3.15.1")
def test_a_scale_within_a_multi_optimizer_is_refused_too():
    inside = keras.optimizers.SGD(1.0)
    variables = variables_of([1.0])
    optimizer = LossScaleOptimizer(keras.optimizers.MultiOptimizer(lambda _: inside))
    optimizer.build(variables)
    inside.loss_scale_factor = 8.0
    with pytest.raises(LossScaleError, match=r"loss_scale_factor = 8\.0"):
        eager(optimizer, tensors([8.0]), variables)
    assert numpy(variables)[0].tolist() == [1.0]


def decayed(cls):
    """Return two weights after a step of decay alone, the first of them left out of it."""
    variables = variables_of([1.0], [1.0])
    optimizer = cls(keras.optimizers.SGD(1.0, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(var_names=["v0"])
    step_of(optimizer)(optimizer, tensors([0.0], [0.0]), variables)
    return [value.tolist() for value in numpy(variables)]


def test_exclude_from_weight_decay_works_through_the_wrapper():
    assert decayed(LossScaleOptimizer) == [[1.0], [0.5]]


@pytest.mark.full
def test_exclude_from_weight_decay_has_no_effect_through_the_stock_wrapper():
    assert decayed(Stock) == [[0.5], [0.5]]


def test_a_schedule_can_be_replaced_only_before_build():
    variables = variables_of([0.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=8.0)
    optimizer.schedule = FixedLossScale(4.0)
    eager(optimizer, tensors([4.0]), variables)
    assert numpy(variables)[0].tolist() == [-1.0]
    with pytest.raises(LossScaleError, match=r"after build.*Set optimizer\.loss_scale"):
        optimizer.schedule = FixedLossScale(16.0)
    assert optimizer.schedule == FixedLossScale(4.0)
