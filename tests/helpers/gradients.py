"""Outputs and gradients of a function of tensors, in each way that a backend can run it.

The function may use layers. Inside it, losses that they add and values that they assign to their
variables can be read; on JAX assigned values are dropped afterwards.
"""

import contextlib

import keras
import numpy as np
from keras import ops

WAYS = {"tensorflow": ["graph", "xla"], "jax": ["jit"], "torch": ["eager"], "numpy": []}[
    keras.backend.backend()
]


def numpy(tensor):
    """Return a tensor as a NumPy array, floats as float64."""
    array = np.array(ops.convert_to_numpy(tensor))
    return array.astype("float64") if array.dtype.kind not in "biu" else array


def is_float(value):
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(value.dtype))


QUICK = {"xla_backend_optimization_level": 0}  # for JAX, where compilation takes most of the time


@contextlib.contextmanager
def float64():
    """Enable float64 on JAX within the context; the other backends always have it."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


def compile_(function, variables, way, optimizer=None):
    """Return a function that returns the outputs, then the gradients of inputs and variables.

    It takes arrays: the inputs, of which only floats are differentiated, and the gradients of the
    outputs, by default ones, which are cast to the dtypes of the outputs.

    Args:
        function: Takes tensors, returns one or a list of them.
        variables: Keras variables that it reads.
        way: One of WAYS, "eager", or "quick", which compiles fastest, for a single run.
        optimizer: If given, takes a step; the new values of the variables are returned too.
    """
    run = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.backend.backend()]
    step = run(_listed(function), variables, way, optimizer)

    def compiled(inputs, upstream=None):
        tensors = [ops.convert_to_tensor(x, dtype=x.dtype.name) for x in map(np.asarray, inputs)]
        # In float32: each is cast to the dtype of its output, which is not known yet.
        wide = None if upstream is None else [np.asarray(u, "float32") for u in upstream]
        return tuple([numpy(y) for y in results] for results in step(tensors, wide))

    return compiled


def _listed(function):
    def listed(*inputs):
        return keras.tree.flatten(function(*inputs))

    return listed


def _ones_or(upstream, outputs):
    given = [ops.ones_like(y) for y in outputs] if upstream is None else upstream
    return [ops.cast(u, y.dtype) for u, y in zip(given, outputs, strict=True)]


def _applied(optimizer, gradients, variables):
    """Take an optimizer step and return the new values; not for JAX, where nothing is assigned."""
    if optimizer is None:
        return ()
    optimizer.apply(gradients[-len(variables) :], variables)
    return ([v.value for v in variables],)


def _tensorflow(function, variables, way, optimizer):
    import tensorflow as tf

    def step(inputs, upstream):
        floats = [x for x in inputs if is_float(x)]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            outputs = function(*inputs)
        gradients = tape.gradient(
            outputs,
            [*floats, *(v.value for v in variables)],
            output_gradients=_ones_or(upstream, outputs),
            unconnected_gradients="zero",
        )
        return outputs, gradients, *_applied(optimizer, gradients, variables)

    if way in {"eager", "quick"}:
        return step
    return tf.function(step, jit_compile=way == "xla")


def _jax(function, variables, way, optimizer):
    import jax

    def step(inputs, upstream, values):
        places = [i for i, x in enumerate(inputs) if is_float(x)]

        def of(floats, values):
            everything = list(inputs)
            for place, value in zip(places, floats, strict=True):
                everything[place] = value
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(mapping, collect_losses=True):
                return function(*everything)

        outputs, pull = jax.vjp(of, [inputs[i] for i in places], values)
        for_inputs, for_values = pull(_ones_or(upstream, outputs))
        results = (outputs, [*for_inputs, *for_values])
        if optimizer is None:
            return results
        state = [v.value for v in optimizer.variables]
        return *results, optimizer.stateless_apply(state, for_values, values)[0]

    options = QUICK if way == "quick" else None
    compiled = step if way == "eager" else jax.jit(step, compiler_options=options)
    return lambda inputs, upstream: compiled(inputs, upstream, [v.value for v in variables])


def _torch(function, variables, way, optimizer):  # noqa: ARG001 - torch has the one way
    import torch

    def step(inputs, upstream):
        inputs = [x.detach().requires_grad_() if is_float(x) else x for x in inputs]
        sources = [*filter(is_float, inputs), *(v.value for v in variables)]
        outputs = function(*inputs)
        upstream = _ones_or(upstream, outputs)
        pairs = [(y, u) for y, u in zip(outputs, upstream, strict=True) if y.requires_grad]
        gradients = torch.autograd.grad(
            [y for y, _ in pairs], sources, [u for _, u in pairs], allow_unused=True
        )
        found = zip(sources, gradients, strict=True)
        gradients = [torch.zeros_like(s) if g is None else g for s, g in found]
        outputs = [y.detach() for y in outputs]
        return outputs, gradients, *_applied(optimizer, gradients, variables)

    return step
