"""Optimizers inside a user-defined optimizer are treated like a wrapped one."""

import keras
import numpy as np
import pytest
from helpers.stepping import (
    EXACT_WAYS,
    assert_same_bits,
    each_of,
    eager,
    numpy,
    tensors,
    variables_of,
)
from keras import ops

from kerasmp.backend.nested import optimizer_chain
from kerasmp.errors import LossScaleError
from kerasmp.optimizer import LossScaleOptimizer

SCALE = 64.0
every_way = each_of(EXACT_WAYS)


class Outer(keras.optimizers.Optimizer):
    """Passes every call on to the inner optimizer."""

    def __init__(self, worker, name="outer"):
        super().__init__(learning_rate=0.0, name=name)
        self.worker = worker

    def build(self, variables):
        super().build(variables)
        self.worker.build(variables)

    @property
    def variables(self):
        return [*super().variables, *self.worker.variables]

    def apply(self, grads, trainable_variables=None):
        self.worker.apply(grads, trainable_variables)


def test_all_are_found_exactly_once():
    inmost, listed = keras.optimizers.SGD(), keras.optimizers.Adam()
    outer = Outer(Outer(inmost))
    outer.more = [listed, {"again": inmost}]
    assert {id(o) for o in optimizer_chain(outer)} == {
        id(o) for o in (outer, outer.worker, inmost, listed)
    }
    assert len(optimizer_chain(outer)) == 4


def test_its_own_loss_scale_is_refused_before_any_change():
    optimizer = LossScaleOptimizer(Outer(keras.optimizers.SGD(1.0, loss_scale_factor=4.0)))
    with pytest.raises(LossScaleError, match=r"loss_scale_factor = 4\.0"):
        optimizer.apply(tensors([1.0]), variables_of([1.0]))
    assert not optimizer.built


def delegating(worker):
    """Return a Keras optimizer whose `apply` is that of another one."""
    outer = keras.optimizers.Adam()
    outer.worker = worker
    object.__setattr__(outer, "apply", worker.apply)
    return outer


def test_one_that_only_an_overridden_method_uses_is_found():
    scaling = LossScaleOptimizer(delegating(keras.optimizers.SGD(1.0, loss_scale_factor=4.0)))
    with pytest.raises(LossScaleError, match=r"loss_scale_factor = 4\.0"):
        scaling.apply(tensors([1.0]), variables_of([1.0]))
    clipping = LossScaleOptimizer(delegating(keras.optimizers.SGD(1.0, clipnorm=1.0)), loss_scale=1)
    clipping.apply(tensors([3e38, 3e38]), variables_of([1.0, 1.0]))
    assert (clipping.applied_steps, clipping.skipped_steps) == (0, 1)


@every_way
def test_averages_of_a_nested_optimizer_start_as_the_weights(step):
    variables = variables_of([1.0, 2.0])
    worker = keras.optimizers.SGD(1.0, use_ema=True)
    step(LossScaleOptimizer(Outer(worker), loss_scale=SCALE), tensors([np.inf, 0.0]), variables)
    assert_same_bits(numpy(worker._model_variables_moving_average), numpy(variables))


@every_way
def test_a_nested_optimizer_may_accumulate_for_float16_variables(step):
    variables = [keras.Variable(ops.cast(ops.zeros(1), "float16"), dtype="float16")]
    worker = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    optimizer = LossScaleOptimizer(Outer(worker), loss_scale=SCALE)
    for gradient in (1.0, 3.0):
        step(optimizer, [ops.cast(ops.array([gradient * SCALE]), "float16")], variables)
    assert numpy(variables)[0].tolist() == [-2.0]
    assert optimizer.accumulated_steps == 0


def test_settings_changed_between_eager_steps_are_used():
    variables = variables_of([0.0])
    worker = keras.optimizers.SGD(1.0)
    optimizer = LossScaleOptimizer(Outer(worker), loss_scale=SCALE)
    eager(optimizer, tensors([SCALE]), variables)
    worker.clipvalue = 0.5
    eager(optimizer, tensors([SCALE]), variables)
    assert numpy(variables)[0].tolist() == [-1.5]
