"""Compares kerasmp's layers with stock layers in float16: a forward and a backward pass.

For an Embedding, it is a whole step with SGD, which changes the table.

KERAS_BACKEND=tensorflow python benchmarks/layers.py --jit no
KERAS_BACKEND=tensorflow python benchmarks/layers.py --jit yes
KERAS_BACKEND=jax python benchmarks/layers.py
KERAS_BACKEND=torch python benchmarks/layers.py Embedding
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import interleaved
import keras
import numpy as np
from keras import ops

from kerasmp import Sequential, layers

# Name: class, arguments, shape of the inputs, passes in a round.
CASES = {
    "Embedding": ("Embedding", {"input_dim": 1_000_000, "output_dim": 64}, (4096,), 5),
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
    "DenseHead": ("DenseHead", {"units": 1000, "activation": "softmax"}, (256, 256), 10),
    "gelu": ("Activation", {"activation": "gelu"}, (256, 1024), 10),
    "silu": ("Activation", {"activation": "silu"}, (256, 1024), 10),
    "tanh": ("Activation", {"activation": "tanh"}, (256, 1024), 10),
    "ELU": ("ELU", {}, (256, 1024), 10),
    "PReLU": ("PReLU", {}, (256, 1024), 10),
    "Softmax": ("Softmax", {}, (256, 1024), 10),
    "BatchNormalization": ("BatchNormalization", {}, (8, 28, 28, 64), 5),
    "Normalization": ("Normalization", {"mean": 3.0, "variance": 4.0}, (256, 1024), 10),
    "UnitNormalization": ("UnitNormalization", {}, (256, 1024), 10),
    "AveragePooling2D": ("AveragePooling2D", {"pool_size": 7}, (4, 56, 56, 16), 5),
    "GlobalAveragePooling1D": ("GlobalAveragePooling1D", {}, (32, 512, 64), 5),
    "Average": ("Average", {}, (256, 1024), 10),
    "Dot": ("Dot", {"axes": -1, "normalize": True}, (256, 1024), 10),
    "ActivityRegularization": ("ActivityRegularization", {"l2": 1e-3}, (256, 1024), 10),
}
TWO_INPUTS = {"Average", "Dot"}
TRAINING = {"BatchNormalization", "SpectralNormalization"}  # do more in training


def built(module, name, arguments, shape):
    keras.utils.set_random_seed(0)
    if name == "SpectralNormalization":
        arguments = {"layer": keras.layers.Dense(256, dtype="mixed_float16")}
    if name == "DenseHead" and module is keras.layers:
        name = "Dense"
    layer = getattr(module, name)(dtype="mixed_float16", **arguments)
    layer.build([shape, shape] if name in TWO_INPUTS else shape)
    return layer


def called(layer, x):
    """Return the loss of a call: the mean square of the outputs plus the losses it adds."""
    name = type(layer).__name__
    training = {"training": True} if name in TRAINING else {}
    outputs = layer([x, x] if name in TWO_INPUTS else x, **training)
    added = sum(ops.cast(loss, "float32") for loss in layer.losses)
    return ops.mean(ops.square(ops.cast(outputs, "float32"))) + added


def passing(layer, x, repeats, *, jit):
    """Return a function that runs the layer forward and backward a few times."""
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
            loss = called(layer, x)
        return tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

    return lambda x: [g.numpy() for g in step(tf.constant(x))]


def _jax(layer, jit):  # noqa: ARG001 - always compiled
    import jax

    variables = layer.variables

    def loss(x, values):
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(mapping, collect_losses=True):
            return called(layer, x)

    step = jax.jit(jax.grad(loss, (0, 1), allow_int=True))
    return lambda x: jax.block_until_ready(step(x, [v.value for v in variables]))


def stepping(layer, batch, repeats, *, jit):
    """Return a function that trains an embedding for a few steps."""
    model = Sequential([keras.Input((), dtype="int32"), layer])
    jit = jit or keras.backend.backend() == "jax"
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
    ids = np.random.default_rng(0).integers(0, layer.input_dim, batch * repeats)
    wanted = np.ones((len(ids), layer.output_dim), "float32")
    return lambda: model.fit(ids, wanted, batch_size=batch, shuffle=False, verbose=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--jit", choices=["no", "yes"], default="no")
    arguments = parser.parse_args()
    jit = arguments.jit == "yes"
    for case in arguments.cases or CASES:
        name, settings, shape, repeats = CASES[case]
        how = {"repeats": repeats, "jit": jit}
        x = np.random.default_rng(0).normal(size=shape).astype("float16")
        compared = {}
        for label, module in (("stock", keras.layers), ("kerasmp", layers)):
            layer = built(module, name, settings, shape)
            compared[f"{label} {name}"] = (
                stepping(layer, *shape, **how) if name == "Embedding" else passing(layer, x, **how)
            )
        way = ", XLA" if jit or keras.backend.backend() == "jax" else ""
        interleaved.report(f"{case}{way}", interleaved.measure(compared, arguments.rounds))


if __name__ == "__main__":
    main()
