"""Defines the cost of the update alone: plain, stock wrapper, kerasmp, and other libraries.

There are 66 variables with 25 million values, and all variants get the same gradients. Besides
times, there are counts, which do not vary: the operations in TensorFlow's graph, and the bytes that
XLA moves and holds on JAX. The other libraries are torch's Adam with `torch.amp.GradScaler`, and on
JAX, if installed, `optax.adam` alone, with jmp, and with flax's DynamicScale, as in their docs.
"""

import importlib.util

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
OPTIMIZERS = {
    "plain": lambda inner: inner,
    interleaved.AGAIN: lambda inner: inner,
    "stock": keras.optimizers.LossScaleOptimizer,
    "kerasmp": mp.LossScaleOptimizer,
}


def variants(name, jit):
    """Return the functions to compare and the dicts of counts, both by name."""
    backend = keras.backend.backend()
    stepping = {"tensorflow": on_tensorflow, "jax": on_jax, "torch": on_torch}[backend]
    compared, counts = {}, {}
    for label, wrap in OPTIMIZERS.items():
        compared[label], counts[label] = stepping(wrap(INNER[name]()), jit)
    if name == "adam" and backend == "torch":
        # The usual way to train in torch is the baseline.
        in_torch = {"GradScaler": True, interleaved.AGAIN: True, "no scaling": False}
        compared = {label: torch_adam(scaled=scaled) for label, scaled in in_torch.items()} | {
            label: run for label, run in compared.items() if label != interleaved.AGAIN
        }
    if name == "adam" and backend == "jax":
        for label, (step, state) in around_optax().items():
            compared[label], counts[label] = compiled(step, state)
    return compared, counts


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
    # XLA compiles them into something else.
    return (lambda: step(grads).numpy()), {} if jit else {"operations": nodes}


def on_jax(optimizer, _):
    variables = built(optimizer)

    def step(state, grads):
        weights, slots = optimizer.stateless_apply(state[1], grads, state[0])
        return list(weights), list(slots)

    def scaled_up(state, grads):
        scale, pairs = optimizer.dynamic_scale, zip(optimizer.variables, state[1], strict=True)
        return step((state[0], [2.0**15 if v is scale else value for v, value in pairs]), grads)

    scales = isinstance(optimizer, mp.LossScaleOptimizer)
    branches = scales and not optimizer.inner_optimizer.global_clipnorm
    state = [v.value for v in variables], [v.value for v in optimizer.variables]
    return compiled(step, state, scaled_up if branches else None)


def compiled(step, state, counted=None):
    """Return a function that runs the step repeatedly, and the costs that XLA reports.

    XLA counts only the more expensive of two branches, so `counted` is a step with the usual one.
    """
    import jax

    grads = [jax.numpy.asarray(g) for g in gradients()]
    step = jax.jit(step, donate_argnums=0).lower(state, grads).compile()
    usual = jax.jit(counted, donate_argnums=0).lower(state, grads).compile() if counted else step
    held = [state]

    def run():
        held[0] = jax.block_until_ready(step(held[0], grads))

    moved = round(usual.cost_analysis()["bytes accessed"] / 1e6)
    scratch = round(step.memory_analysis().temp_size_in_bytes / 1e6, 1)
    return run, {"MB moved": moved, "MB held": scratch}


def around_optax():
    """Return steps and states of optax's Adam: alone, with jmp, and with flax's DynamicScale."""
    if importlib.util.find_spec("optax") is None:
        return {}
    import jax
    import optax
    from jax import numpy as jnp

    adam = optax.adam(1e-3)

    def update(weights, slots, grads):
        change, slots = adam.update(grads, slots, weights)
        return optax.apply_updates(weights, change), slots

    def start():
        weights = [jnp.zeros(shape) for shape in SHAPES]
        return weights, adam.init(weights)

    def unscaled(state, grads):
        return update(*state, grads)

    found = {"optax": (unscaled, start())}
    if importlib.util.find_spec("jmp") is not None:
        import jmp

        def with_jmp(state, grads):
            before, *values = state
            scale = jmp.DynamicLossScale(*values)
            grads = scale.unscale(grads)
            finite = jmp.all_finite(grads)
            after = jmp.select_tree(finite, update(*before, grads), before)
            scale = scale.adjust(finite)
            return after, scale.loss_scale, scale.counter

        # The state holds the scale's values, because JAX cannot lower a function of the object.
        found["optax, jmp"] = with_jmp, (start(), jnp.float32(2.0**15), jnp.int32(0))
    if importlib.util.find_spec("flax") is not None:
        from flax.training.dynamic_scale import DynamicScale

        def with_flax(state, grads):
            before, scale = state
            # It computes the gradient itself. The gradient of this sum needs one pass, so that the
            # bytes moved are only those of the unscaling.
            gradient_of = scale.value_and_grad(
                lambda weights: sum(map(jnp.vdot, jax.tree.leaves(weights), grads))
            )
            scale, finite, _, grads = gradient_of(before[0])
            after = update(*before, grads)
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before), scale

        found["optax, flax"] = with_flax, (start(), DynamicScale())
    return found


def on_torch(optimizer, _):
    import torch

    variables = built(optimizer)
    grads = [torch.tensor(g, device=variables[0].value.device) for g in gradients()]

    copies = [None] * len(grads)

    def run():
        # GradScaler changes its gradients in place, so all variants get copies.
        for i, gradient in enumerate(grads):
            copies[i] = gradient.clone()
        with torch.no_grad():
            optimizer.apply(copies, variables)
        finish()

    return run, {}


def torch_adam(*, scaled):
    """Return a step of torch's fused Adam, with GradScaler or alone."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in SHAPES]
    grads = [torch.tensor(g, device=device) for g in gradients()]
    optimizer = torch.optim.Adam(weights, 1e-3, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=scaled)
    scaler.scale(torch.zeros((), device=device))

    def run():
        for weight, gradient in zip(weights, grads, strict=True):
            weight.grad = gradient.clone()
        scaler.step(optimizer)
        scaler.update()
        finish()

    return run


def finish():
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
