"""Compares attention in kerasmp with stock layers in float16: a forward and a backward pass.

Stock MultiHeadAttention does not run in float16 on CPUs with JAX. There, the baseline is the stock
layer in float32, which is also shown on other backends.

    KERAS_BACKEND=tensorflow python benchmarks/attention.py --jit no
    KERAS_BACKEND=tensorflow python benchmarks/attention.py --jit yes
    KERAS_BACKEND=jax python benchmarks/attention.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import interleaved
import keras
import numpy as np

from kerasmp import layers

BATCH, TIME, WIDTH, HEADS = 4, 128, 256, 4
STOCK = keras.layers


def multi(module, dtype, **settings):
    layer = module.MultiHeadAttention(HEADS, WIDTH // HEADS, dtype=dtype, **settings)
    return layer, lambda x: layer(x, x, training=True)


def grouped(module, dtype, **settings):
    layer = module.GroupQueryAttention(WIDTH // HEADS, HEADS, 2, dtype=dtype, **settings)
    return layer, lambda x: layer(x, x, training=True)


def dropping(module, dtype):
    return multi(module, dtype, dropout=0.1)


def masked(module, dtype):
    layer, _ = multi(module, dtype)
    return layer, lambda x: layer(x, x, use_causal_mask=True, training=True)


def dot(module, dtype):
    layer = module.Attention(dtype=dtype)
    return layer, lambda x: layer([x, x])


def additive(module, dtype):
    layer = module.AdditiveAttention(dtype=dtype)
    return layer, lambda x: layer([x[:, :32, :64], x[:, 32:64, :64]])


KINDS = {
    "multi": multi,
    "grouped": grouped,
    "dropping": dropping,
    "causal": masked,
    "dot": dot,
    "additive": additive,
}


def step(make, module, dtype, *, jit):
    """Return a function that runs one step and waits for it."""
    layer, call = make(module, dtype)
    x = np.random.default_rng(0).normal(size=(BATCH, TIME, WIDTH)).astype("float32")
    call(keras.ops.convert_to_tensor(x))
    backend = keras.backend.backend()
    return globals()[f"_{backend}"](layer, call, x, jit=jit)


def _tensorflow(layer, call, x, *, jit):
    import tensorflow as tf

    @tf.function(jit_compile=jit)
    def compiled(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.cast(call(x), "float32") ** 2)
        return tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

    x = tf.constant(x)
    return lambda: [g.numpy() for g in compiled(x)]


def _jax(layer, call, x, *, jit):  # noqa: ARG001 - always compiled
    import jax

    # All state, including dropout seeds: a step may assign only to its arguments.
    variables = layer.non_trainable_variables

    @jax.jit
    def compiled(x, values, others):
        def loss(x, values):
            pairs = [*zip(layer.trainable_variables, values, strict=True)]
            pairs += zip(variables, others, strict=True)
            with keras.StatelessScope(state_mapping=pairs):
                return jax.numpy.sum(call(x).astype("float32") ** 2)

        return jax.grad(loss, (0, 1))(x, values)

    values = [v.value for v in layer.trainable_variables]
    others = [v.value for v in variables]
    return lambda: jax.block_until_ready(compiled(x, values, others))


def variants(kind, *, jit):
    """Return the functions to compare, by name: first stock in float16, if it runs."""
    compared = {
        "stock float16": (STOCK, "mixed_float16"),
        "kerasmp float16": (layers, "mixed_float16"),
        "stock float32": (STOCK, "float32"),
    }
    if keras.backend.backend() == "jax" and kind in {"multi", "grouped", "causal"}:
        compared = {name: compared[name] for name in ("stock float32", "kerasmp float16")}
    return {name: step(KINDS[kind], *what, jit=jit) for name, what in compared.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"any of {', '.join(KINDS)}; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="steps in a round")
    parser.add_argument("--jit", choices=["no", "yes"], default="no")
    arguments = parser.parse_args()
    jit = arguments.jit == "yes" or keras.backend.backend() == "jax"
    for kind in arguments.kinds or KINDS:
        compared = {
            name: lambda f=function: [f() for _ in range(arguments.steps)]
            for name, function in variants(kind, jit=jit).items()
        }
        times = interleaved.measure(compared, arguments.rounds)
        interleaved.report(f"{kind}{', jit' if jit else ''}", times)


if __name__ == "__main__":
    main()
