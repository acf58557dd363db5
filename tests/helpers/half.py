"""What float16 can do at best, and what a function does: errors, and gradients on any backend."""

import keras
import numpy as np
from keras import ops

# How a step is run on each backend.
MODES = {"tensorflow": ["graph", "xla"], "jax": ["jit"], "torch": ["eager"]}[
    keras.backend.backend()
]
SMALLEST, LARGEST = 2.0**-14, 65504.0  # of the normal numbers of float16


def numpy_of(tensor):
    return np.array(ops.convert_to_numpy(ops.cast(tensor, "float32")), "float64")


def half(values):
    """Round to float16, and give back as float64."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype("float16").astype("float64")


def error(got, want):
    """Return ||got - want|| / ||want|| where float16 can hold `want`; None if it can nowhere."""
    held = (np.abs(want) >= SMALLEST) & (np.abs(want) <= LARGEST)
    if not held.any():
        return None
    return np.linalg.norm((got - want)[held]) / np.linalg.norm(want[held])


def run(mode, function, inputs, upstream, variables=()):
    """Return the outputs of `function(*inputs)`, and gradients, all as float64 arrays.

    Args:
        mode: One of MODES.
        function: Takes and returns tensors.
        inputs: Arrays; they become float16 tensors.
        upstream: The gradient of the outputs.
        variables: Keras variables that get gradients too, after those of the inputs.
    """
    outputs, gradients = globals()[f"_{mode}"](
        function, [np.asarray(x, "float16") for x in inputs], upstream, variables
    )
    return numpy_of(outputs), [numpy_of(g) for g in gradients]


def _tensorflow(function, inputs, upstream, variables, *, jit):
    import tensorflow as tf

    @tf.function(jit_compile=jit)
    def step(inputs, upstream):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
        sources = [*inputs, *(v.value for v in variables)]
        return outputs, tape.gradient(outputs, sources, tf.cast(upstream, outputs.dtype))

    return step([tf.constant(x) for x in inputs], tf.constant(upstream))


def _graph(*arguments):
    return _tensorflow(*arguments, jit=False)


def _xla(*arguments):
    return _tensorflow(*arguments, jit=True)


def _jit(function, inputs, upstream, variables):
    import jax

    @jax.jit
    def step(inputs, values, upstream):
        def stateless(inputs, values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(*inputs)

        outputs, pull = jax.vjp(stateless, inputs, values)
        of_inputs, of_values = pull(upstream.astype(outputs.dtype))
        return outputs, [*of_inputs, *of_values]

    return step([jax.numpy.asarray(x) for x in inputs], [v.value for v in variables], upstream)


def _eager(function, inputs, upstream, variables):
    import torch

    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    outputs = function(*tensors)
    sources = [*tensors, *(v.value for v in variables)]
    upstream = torch.tensor(upstream).to(outputs.dtype)
    return outputs, torch.autograd.grad(outputs, sources, upstream)
