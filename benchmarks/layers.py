"""What kerasmp's layers cost in float16: a forward and a backward pass, stock Keras's and ours.

KERAS_BACKEND=tensorflow python benchmarks/layers.py --jit no
KERAS_BACKEND=tensorflow python benchmarks/layers.py --jit yes
KERAS_BACKEND=jax python benchmarks/layers.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import interleaved
import keras
import numpy as np
from keras import ops

from kerasmp import layers

# Name: class, arguments, shape of the inputs, passes in a round.
CASES = {
    "LSTM": ("LSTM", {"units": 128, "return_sequences": True}, (16, 64, 64), 3),
    "GRU": ("GRU", {"units": 128, "return_sequences": True}, (16, 64, 64), 3),
    "GRU, wide": ("GRU", {"units": 256, "return_sequences": True}, (16, 64, 256), 2),
    "Dense": ("Dense", {"units": 256, "activation": "relu"}, (1024, 256), 10),
    "EinsumDense": (
        "EinsumDense",
        {"equation": "abc,cd->abd", "output_shape": (None, 256), "bias_axes": "d"},
        (16, 64, 256),
        10,
    ),
    "Conv1D": ("Conv1D", {"filters": 32, "kernel_size": 3}, (8, 512, 32), 5),
    "Conv2D": (
        "Conv2D",
        {"filters": 16, "kernel_size": 3, "activation": "relu"},
        (4, 56, 56, 16),
        5,
    ),
    "Conv2DTranspose": ("Conv2DTranspose", {"filters": 8, "kernel_size": 3}, (4, 28, 28, 16), 5),
    "DepthwiseConv2D": ("DepthwiseConv2D", {"kernel_size": 3}, (4, 56, 56, 16), 5),
    "SpectralNormalization": ("SpectralNormalization", {}, (256, 256), 10),
}


def built(module, name, arguments, shape):
    keras.utils.set_random_seed(0)
    if name == "SpectralNormalization":
        arguments = {"layer": keras.layers.Dense(256, dtype="mixed_float16")}
    layer = getattr(module, name)(dtype="mixed_float16", **arguments)
    layer.build(shape)
    return layer


def passing(layer, x, repeats, *, jit):
    """Return a function that runs the layer forward and backward, a few times."""
    run = {"tensorflow": _tensorflow, "jax": _jax}[keras.backend.backend()](layer, jit)

    def repeat():
        for _ in range(repeats):
            run(x)

    return repeat


def _tensorflow(layer, jit):
    import tensorflow as tf

    @tf.function(jit_compile=jit)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_mean(tf.square(tf.cast(layer(x, **_training(layer)), "float32")))
        return tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

    return lambda x: [g.numpy() for g in step(tf.constant(x))]


def _jax(layer, jit):  # noqa: ARG001 - JAX has no other way
    import jax

    variables = layer.variables

    def loss(x, values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            outputs = layer(x, **_training(layer))
        return ops.mean(ops.square(ops.cast(outputs, "float32")))

    step = jax.jit(jax.grad(loss, (0, 1), allow_int=True))
    return lambda x: jax.block_until_ready(step(x, [v.value for v in variables]))


def _training(layer):
    return {"training": True} if "Spectral" in type(layer).__name__ else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--jit", choices=["no", "yes"], default="no")
    arguments = parser.parse_args()
    jit = arguments.jit == "yes"
    for case in arguments.cases or CASES:
        name, settings, shape, repeats = CASES[case]
        x = np.random.default_rng(0).normal(size=shape).astype("float16")
        compared = {
            f"{label} {name}": passing(built(module, name, settings, shape), x, repeats, jit=jit)
            for label, module in (("stock", keras.layers), ("kerasmp", layers))
        }
        way = ", XLA" if jit or keras.backend.backend() == "jax" else ""
        interleaved.report(f"{case}{way}", interleaved.measure(compared, arguments.rounds))


if __name__ == "__main__":
    main()
