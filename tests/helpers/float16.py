"""How far a float16 computation is from a float64 reference, and how near it could be."""

from functools import cache, partial

import keras
import numpy as np
from keras import ops

LARGEST, LEAST_NORMAL = 65504.0, 2.0**-14


def numpy_of(tensor):
    """Return a tensor of any float dtype as a float64 array."""
    return np.array(ops.convert_to_numpy(ops.cast(tensor, "float32")), "float64")


def rounded(values):
    """Return the float64 values nearest to `values` that float16 holds."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype("float16").astype("float64")


def draw(seed, shape, scale=1.0):
    """Return normal numbers that float16 holds."""
    return rounded(np.random.default_rng(seed).normal(size=shape) * scale)


def _tensorflow(function, *, jit_compile):
    import tensorflow as tf

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step(inputs, upstream):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
        upstream = tf.cast(upstream, outputs.dtype)
        return outputs, tape.gradient(outputs, inputs, output_gradients=upstream)

    return step


def _jax(function):
    import jax

    @jax.jit
    def step(inputs, upstream):
        outputs, pull = jax.vjp(function, *inputs)
        return outputs, pull(upstream.astype(outputs.dtype))

    return step


def _torch(function):
    import torch

    def step(inputs, upstream):
        inputs = [tensor.requires_grad_() for tensor in inputs]
        outputs = function(*inputs)
        upstream = upstream.to(outputs.dtype)
        return outputs.detach(), torch.autograd.grad(outputs, inputs, upstream)

    return step


# The ways in which the running backend compiles a step.
MODES = {
    "tensorflow": {
        "graph": partial(_tensorflow, jit_compile=False),
        "xla": partial(_tensorflow, jit_compile=True),
    },
    "jax": {"jit": _jax},
    "torch": {"eager": _torch},
}[keras.backend.backend()]


@cache  # one function drawn many inputs for is compiled once for each shape
def _compiled(mode, function):
    return MODES[mode](function)


def step(mode, function, inputs, upstream, dtype="float16"):
    """Return the outputs of `function` and the gradients of its inputs, as float64 arrays.

    The inputs are cast to `dtype`, the upstream gradient to the dtype of the outputs.
    """
    tensors = [ops.convert_to_tensor(np.asarray(x, dtype)) for x in inputs]
    upstream = ops.convert_to_tensor(np.asarray(upstream, "float32"))
    outputs, gradients = _compiled(mode, function)(tensors, upstream)
    return numpy_of(outputs), [numpy_of(gradient) for gradient in gradients]


def errors(got, reference):
    """Return the error of `got`, and that of the reference rounded to float16.

    References that float16 cannot hold, or only as a subnormal number, are left out; where nothing
    else is left, only true zeros count.
    """
    size = np.abs(reference)
    counted = (size <= LARGEST) & ((size >= LEAST_NORMAL) | (reference == 0))
    got, best, reference = (np.where(counted, x, 0) for x in (got, rounded(reference), reference))
    length = np.linalg.norm(reference)
    if length == 0:
        return float(np.linalg.norm(got)), 0.0
    return tuple(float(np.linalg.norm(x - reference) / length) for x in (got, best))


def assert_near_best(got, reference, slack=0.0):
    """Fail unless the error of `got` is within four times the best that float16 allows.

    `slack` is an absolute error that float32 has too.
    """
    error, best = errors(got, reference)
    allowed = 4 * best + slack / (np.linalg.norm(reference) or 1)
    assert error <= allowed, f"error {error:.3g}, best {best:.3g}: {error / (best or 1):.3g} times"
