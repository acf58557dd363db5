"""One optimizer step in every way that the backend supports, for any optimizer class."""

import keras
import numpy as np
import pytest
from helpers.marks import few
from keras import ops

from kerasmp.optimizer import LossScaleOptimizer

Stock = keras.optimizers.LossScaleOptimizer
BACKEND = keras.backend.backend()


def built(optimizer, variables):
    """Build the optimizer once: stock Keras starts over at each call of `build`."""
    if not optimizer.built:
        optimizer.build(variables)


def eager(optimizer, grads, variables):
    """Call `apply` as a user-defined loop does."""
    optimizer.apply(grads, variables)


def stateless(optimizer, grads, variables):
    """Call `stateless_apply` and assign what it returns."""
    built(optimizer, variables)
    values, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], grads, [v.value for v in variables]
    )
    for variable, value in zip([*variables, *optimizer.variables], [*values, *state], strict=True):
        variable.assign(value)


def _graph(jit_compile):
    def step(optimizer, grads, variables):
        import tensorflow as tf

        built(optimizer, variables)
        if not hasattr(optimizer, "_test_step"):
            optimizer._test_step = tf.function(
                lambda grads: optimizer.apply(grads, variables), jit_compile=jit_compile
            )
        optimizer._test_step(grads)

    step.__name__ = "xla" if jit_compile else "graph"
    return step


graph, xla = _graph(jit_compile=False), _graph(jit_compile=True)


def jitted(optimizer, grads, variables):
    """Call `stateless_apply` as a jitted train step does, and assign what it returns."""
    import jax

    built(optimizer, variables)
    if not hasattr(optimizer, "_test_step"):
        optimizer._test_step = jax.jit(optimizer.stateless_apply)
    values, state = optimizer._test_step(
        [v.value for v in optimizer.variables], grads, [v.value for v in variables]
    )
    for variable, value in zip([*variables, *optimizer.variables], [*values, *state], strict=True):
        variable.assign(value)


# On JAX stock Keras supports only the stateless step.
stock_step = stateless if BACKEND == "jax" else eager
WAYS = {"tensorflow": [eager, graph, xla], "jax": [eager, stateless], "torch": [eager]}[BACKEND]

# The ways in which the wrapped and the plain optimizer run the same operations. Left out are those
# in which XLA compiles only the wrapped update, or compiles it within a branch: it may then fuse
# products and sums (measured: Lion and Adafactor under XLA on TensorFlow, every optimizer in an
# eager loop on JAX, both in the last bits).
EXACT_WAYS = {"tensorflow": [eager, graph], "jax": [jitted], "torch": [eager]}[BACKEND]


def each_of(ways, quick=None):
    """Parametrize `step` by these ways; those not in `quick` are for the full set.

    Args:
        ways: Some of the functions above.
        quick: By default the first of the ways.
    """
    params = few(ways, ways[:1] if quick is None else quick)
    names = [way.__name__ for way in ways]
    return pytest.mark.parametrize("step", params, ids=names)


def step_of(optimizer):
    """Return the simplest step that the class of the optimizer supports on this backend."""
    return eager if isinstance(optimizer, LossScaleOptimizer) else stock_step


def variables_of(*values):
    """Return one float32 variable for each value."""
    return [keras.Variable(np.asarray(v, "float32"), name=f"v{i}") for i, v in enumerate(values)]


def tensors(*values):
    """Return one float32 tensor for each value, None for None."""
    return [None if v is None else ops.convert_to_tensor(np.asarray(v, "float32")) for v in values]


def numpy(variables):
    """Return the variables' values as NumPy arrays."""
    return [ops.convert_to_numpy(v.value) for v in variables]


def assert_same_bits(actual, expected):
    """Assert that arrays are equal without any tolerance; NaN equals NaN."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e, strict=True)
