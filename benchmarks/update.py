"""What the optimizer's update alone takes: plain, in stock Keras's wrapper, and in ours.

Of 66 variables with 25 million values and the same gradients. Beside the times stand counts, which
do not move: operations of TensorFlow's graph, and bytes that XLA moves and holds on JAX. On torch
the first is torch's own fused Adam under `torch.amp.GradScaler`; all get copies of the gradients,
since GradScaler changes those that it is given.

    KERAS_BACKEND=tensorflow python benchmarks/update.py adam [--jit yes]
    KERAS_BACKEND=jax python benchmarks/update.py momentum
    KERAS_BACKEND=torch python benchmarks/update.py adam
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import interleaved
import keras
import numpy as np

import kerasmp as mp

SHAPES = [(2048, 1024)] * 8 + [(1024, 1024)] * 8 + [(256, 64)] * 2 + [(1024,)] * 48
INNER = {
    "adam": lambda: keras.optimizers.Adam(1e-3),
    "clipped": lambda: keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
    "momentum": lambda: keras.optimizers.SGD(1e-3, momentum=0.9),
}


def gradients():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, "float32") for shape in SHAPES]


def built(optimizer):
    variables = [keras.Variable(np.zeros(shape, "float32")) for shape in SHAPES]
    optimizer.build(variables)
    return variables


def on_tensorflow(optimizer, jit):
    import tensorflow as tf

    variables, grads = built(optimizer), [tf.constant(g) for g in gradients()]

    @tf.function(jit_compile=jit)
    def step(grads):
        optimizer.apply(grads, variables)
        return tf.constant(0)

    graph = step.get_concrete_function(grads).graph.as_graph_def()
    nodes = len(graph.node) + sum(len(f.node_def) for f in graph.library.function)
    return (lambda: step(grads).numpy()), f"{nodes} operations"


def on_jax(optimizer, _):
    import jax

    variables, grads = built(optimizer), [jax.numpy.asarray(g) for g in gradients()]
    state = [[v.value for v in variables], [v.value for v in optimizer.variables]]
    step = jax.jit(
        lambda weights, slots, grads: optimizer.stateless_apply(slots, grads, weights),
        donate_argnums=(0, 1),
    )
    compiled = step.lower(*state, grads).compile()
    moved = compiled.cost_analysis()["bytes accessed"] / 1e6
    held = compiled.memory_analysis().temp_size_in_bytes / 1e6

    def run():
        state[:] = jax.block_until_ready(compiled(*state, grads))

    return run, f"{moved:.0f} MB moved, {held:.1f} MB held"


def on_torch(optimizer, _):
    import torch

    variables, grads = built(optimizer), [torch.tensor(g) for g in gradients()]

    def run():
        with torch.no_grad():
            optimizer.apply([g.clone() for g in grads], variables)

    return run, ""


def torchs_own():
    import torch

    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    grads = [torch.tensor(g) for g in gradients()]
    optimizer = torch.optim.Adam(weights, 1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))

    def run():
        for weight, gradient in zip(weights, grads, strict=True):
            weight.grad = gradient.clone()
        scaler.step(optimizer)
        scaler.update()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("optimizer", choices=INNER)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--jit", choices=["no", "yes"], default="no")
    arguments = parser.parse_args()
    inner, backend = INNER[arguments.optimizer], keras.backend.backend()
    stepping = {"tensorflow": on_tensorflow, "jax": on_jax, "torch": on_torch}[backend]
    own = backend == "torch" and arguments.optimizer == "adam"
    compared = {"torch's fused Adam, GradScaler": torchs_own()} if own else {}
    for name, optimizer in {
        "plain": inner(),
        "stock LossScaleOptimizer": keras.optimizers.LossScaleOptimizer(inner()),
        "kerasmp LossScaleOptimizer": mp.LossScaleOptimizer(inner()),
    }.items():
        compared[name], counts = stepping(optimizer, arguments.jit == "yes")
        print(f"{name}: {counts}")
    interleaved.report(arguments.optimizer, interleaved.measure(compared, arguments.rounds))


if __name__ == "__main__":
    main()
