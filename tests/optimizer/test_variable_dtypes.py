"""Variables that are not float32: a step equals that of the plain optimizer, bit for bit."""

import keras
import numpy as np
import pytest
from helpers.marks import few
from helpers.stepping import BACKEND, EXACT_WAYS, assert_same_bits, each_of, numpy
from keras import ops

from kerasmp.optimizer import LossScaleOptimizer

SCALE = 2.0**4  # scaled gradients fit into float16
COMPANY = {
    "alone": {},
    "accumulating": {"gradient_accumulation_steps": 2},
    "averaging": {"use_ema": True, "ema_overwrite_frequency": 2},
    "decaying": {"weight_decay": 0.5},
}
every_way = each_of(EXACT_WAYS)
CASES = [*(("float16", name) for name in COMPANY), ("bfloat16", "decaying")]
CASES += [("float64", "accumulating")] * (BACKEND != "jax")  # JAX has no float64 by default
QUICK = [("float16", "accumulating"), ("float16", "averaging"), ("bfloat16", "decaying")]


def tensor(values, dtype):
    return ops.cast(ops.array(values, "float32"), dtype)


@every_way
@pytest.mark.parametrize(("dtype", "company"), few(CASES, QUICK), ids=map(" ".join, CASES))
def test_any_float_dtype(dtype, company, step):
    def make():
        return keras.optimizers.SGD(0.25, momentum=0.5, **COMPANY[company])

    ours, theirs = (keras.Variable(tensor([1.0, -2.0], dtype), dtype=dtype) for _ in "ab")
    wrapped, plain = LossScaleOptimizer(make(), loss_scale=SCALE, fused=False), make()
    for gradient in ([0.5, -0.25], [np.nan, 1.0], [1.5, 0.75], [0.125, -3.0], [1.0, 1.0]):
        step(wrapped, [tensor(gradient, dtype) * SCALE], [ours])
        if np.isfinite(gradient).all():
            step(plain, [tensor(gradient, dtype)], [theirs])
    assert (wrapped.applied_steps, wrapped.skipped_steps) == (4, 1)
    start = ops.convert_to_numpy(tensor([1.0, -2.0], dtype))
    assert np.all(numpy([ours])[0] != start)
    assert_same_bits(numpy([ours]), numpy([theirs]))
    assert_same_bits(numpy(wrapped.inner_optimizer.variables), numpy(plain.variables))


@every_way
@pytest.mark.backend("tensorflow", "torch")
def test_float64_keeps_what_float32_cannot_hold(step):
    variable = keras.Variable(tensor([0.0], "float64"), dtype="float64")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=SCALE)
    step(optimizer, [ops.array([1e200], "float64")], [variable])
    assert numpy([variable])[0].tolist() == [-1e200 / SCALE]
    assert optimizer.applied_steps == 1


@every_way
@pytest.mark.parametrize("accumulation", few([None, 2], [2]))
def test_what_a_float16_variable_cannot_take_is_skipped(step, accumulation):
    variable = keras.Variable(tensor([1.0], "float16"), dtype="float16")
    inner = keras.optimizers.SGD(1.0, gradient_accumulation_steps=accumulation)
    optimizer = LossScaleOptimizer(inner, loss_scale=None)
    step(optimizer, [tensor([1e5], "float32")], [variable])
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (0, 1)
    assert numpy([variable])[0].tolist() == [1.0]
