"""Input that cannot be used is an error, and nothing has changed: no weight, slot or counter."""

import keras
import numpy as np
import pytest
from helpers.stepping import assert_same_bits, eager, numpy, tensors, variables_of

from kerasmp.errors import LossScaleError
from kerasmp.optimizer import LossScaleOptimizer

GOOD, BAD = ([64.0, 64.0], [64.0]), ([np.nan, 1.0], [1.0])
CALLS = {
    "no gradients for variables": lambda o, v: o.apply([], v),
    "too few gradients": lambda o, v: o.apply(tensors(GOOD[0]), v),
    "too few, no variables": lambda o, _: o.apply(tensors(GOOD[0])),
    "too many gradients": lambda o, v: o.apply(tensors(*GOOD, [1.0]), v),
    "too many, no variables": lambda o, _: o.apply(tensors(*GOOD, [1.0])),
    "too few, not finite": lambda o, v: o.apply(tensors(BAD[0]), v),
    "an unknown variable": lambda o, v: o.apply(tensors(*GOOD), [v[0], *variables_of([1.0])]),
    "unknown variables": lambda o, _: o.apply(tensors(*GOOD), variables_of([1.0, 2.0], [3.0])),
    "unknown variables, pairs": lambda o, _: o.apply_gradients(
        [*zip(tensors(*GOOD), variables_of([1.0, 2.0], [3.0]), strict=True)]
    ),
    "all None": lambda o, v: o.apply([None, None], v),
    "all None, no variables": lambda o, _: o.apply([None, None]),
    "stateless, a gradient too few": lambda o, v: o.stateless_apply(
        [x.value for x in o.variables], tensors(GOOD[0]), [x.value for x in v]
    ),
    "stateless, a value too few": lambda o, v: o.stateless_apply(
        [x.value for x in o.variables[1:]], tensors(*GOOD), [x.value for x in v]
    ),
}


def used():
    """Return an optimizer in which nothing is 0, and its variables."""
    variables = variables_of([1.0, 2.0], [3.0])
    inner = keras.optimizers.Adam(0.1, use_ema=True, gradient_accumulation_steps=2)
    optimizer = LossScaleOptimizer(inner, loss_scale=64.0)
    for grads in (GOOD, BAD, GOOD, GOOD):
        eager(optimizer, tensors(*grads), variables)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (3, 1)
    return optimizer, variables


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_error_comes_before_any_change(call):
    optimizer, variables = used()
    before = numpy([*variables, *optimizer.variables])
    with pytest.raises(LossScaleError, match=r"Received: .*Expected: "):
        call(optimizer, variables)
    assert_same_bits(numpy([*variables, *optimizer.variables]), before)
    # And the next step is one like any other.
    eager(optimizer, tensors(*GOOD), variables)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (4, 1)


@pytest.mark.parametrize("call", ["apply", "set_weights", "stateless_apply"])
def test_without_variables_an_optimizer_that_is_not_built_stays_so(call):
    optimizer = LossScaleOptimizer("adam")
    arguments = {"apply": [[1.0]], "set_weights": [[1.0]], "stateless_apply": [[], [1.0], []]}
    with pytest.raises(LossScaleError, match=r"not built|call build|not supported"):
        getattr(optimizer, call)(*arguments[call])
    assert not optimizer.built
    assert not optimizer.inner_optimizer.built
