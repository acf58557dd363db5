"""Input that cannot be used is an error, and nothing has changed: no weight, slot or counter."""

import keras
import numpy as np
import pytest
from helpers.stepping import BACKEND, assert_same_bits, eager, graph, numpy, tensors, variables_of

from kerasmp.errors import LossScaleError
from kerasmp.optimizer import LossScaleOptimizer

GOOD, BAD = ([64.0, 64.0], [64.0]), ([np.nan, 1.0], [1.0])
UNKNOWN = r"Unknown variable.*Received: %s\. Expected: variables among v0, v1\. .*one optimizer"
# Each with what the error says.
CALLS = {
    "no gradients for variables": (
        lambda o, v: o.apply([], v),
        "Received: 0 gradients for 2 variables",
    ),
    "too few gradients": (
        lambda o, v: o.apply(tensors(GOOD[0]), v),
        "Received: 1 gradients for 2 variables. Expected: one gradient, or None, for each",
    ),
    "too few, no variables": (
        lambda o, _: o.apply(tensors(GOOD[0])),
        "Received: 1 gradients for 2 variables",
    ),
    "too many gradients": (
        lambda o, v: o.apply(tensors(*GOOD, [1.0]), v),
        "Received: 3 gradients for 2 variables",
    ),
    "too many, no variables": (
        lambda o, _: o.apply(tensors(*GOOD, [1.0])),
        "Received: 3 gradients for 2 variables",
    ),
    "too few, not finite": (
        lambda o, v: o.apply(tensors(BAD[0]), v),
        "Received: 1 gradients for 2 variables",
    ),
    "an unknown variable": (
        lambda o, v: o.apply(tensors(*GOOD), [v[0], *variables_of([1.0])]),
        UNKNOWN % "v0, v0",
    ),
    "unknown variables": (
        lambda o, _: o.apply(tensors(*GOOD), variables_of([1.0, 2.0], [3.0])),
        UNKNOWN % "v0, v1",
    ),
    "unknown variables, pairs": (
        lambda o, _: o.apply_gradients(
            [*zip(tensors(*GOOD), variables_of([1.0, 2.0], [3.0]), strict=True)]
        ),
        UNKNOWN % "v0, v1",
    ),
    "all None": (lambda o, v: o.apply([None, None], v), "No gradients provided for any variable"),
    "all None, no variables": (
        lambda o, _: o.apply([None, None]),
        "No gradients provided for any variable.*Received: 2 gradients, all None",
    ),
}


def stateless(state=None, grads=GOOD, first=0):
    """Return a call of `stateless_apply` with some of the values that it needs."""
    return lambda o, v: o.stateless_apply(
        [x.value for x in o.variables[state:]], tensors(*grads), [x.value for x in v[first:]]
    )


if BACKEND == "tensorflow":
    CALLS["stateless"] = stateless(), "not supported with the TensorFlow backend.*Received: "
else:
    CALLS |= {
        "stateless, a gradient too few": (stateless(grads=GOOD[:1]), "`grads` does not match"),
        "stateless, a value too few": (stateless(state=1), "`optimizer_variables` does not match"),
        "stateless, a weight too few": (stateless(first=1), "`trainable_variables` does not match"),
        "stateless, all None": (
            lambda o, v: o.stateless_apply(
                [x.value for x in o.variables], [None, None], [x.value for x in v]
            ),
            "No gradients provided for any variable",
        ),
    }


@pytest.fixture(scope="module")
def used():
    """Return an optimizer in which nothing is 0, and its variables."""
    variables = variables_of([1.0, 2.0], [3.0])
    inner = keras.optimizers.Adam(0.1, use_ema=True, gradient_accumulation_steps=2)
    optimizer = LossScaleOptimizer(inner, loss_scale=64.0)
    for grads in (GOOD, BAD, GOOD, GOOD):
        eager(optimizer, tensors(*grads), variables)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (3, 1)
    return optimizer, variables


@pytest.mark.parametrize(("call", "told"), CALLS.values(), ids=CALLS)
def test_an_error_comes_before_any_change(call, told, used):
    optimizer, variables = used
    before, applied = numpy([*variables, *optimizer.variables]), optimizer.applied_steps
    with pytest.raises(LossScaleError, match=told) as caught:
        call(optimizer, variables)
    assert "Received: " in str(caught.value)
    assert "Expected: " in str(caught.value)
    assert_same_bits(numpy([*variables, *optimizer.variables]), before)
    # And the next step is one like any other.
    eager(optimizer, tensors(*GOOD), variables)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (applied + 1, 1)


@pytest.mark.backend("tensorflow")
def test_a_graph_without_gradients_is_told(used):
    optimizer, variables = used
    # In a function that AutoGraph converts, TensorFlow gives the message another type.
    with pytest.raises(Exception, match="No gradients provided for any variable"):
        graph(optimizer, [None, None], variables)


ON_STATELESS = "not supported" if BACKEND == "tensorflow" else r"Call optimizer\.build"


@pytest.mark.parametrize(
    ("call", "arguments", "told"),
    [
        ("apply", [[1.0]], "call build"),
        ("set_weights", [[1.0]], "not built"),
        ("stateless_apply", [[], [1.0], []], ON_STATELESS),
    ],
)
def test_without_variables_an_optimizer_that_is_not_built_stays_so(call, arguments, told):
    optimizer = LossScaleOptimizer("adam")
    with pytest.raises(LossScaleError, match=told):
        getattr(optimizer, call)(*arguments)
    assert not optimizer.built
    assert not optimizer.inner_optimizer.built
