"""Bytes that a step moves and holds beside its state: no copy of the parameters."""

import keras
import numpy as np
import pytest
from helpers.stepping import tensors

import kerasmp as mp

SHAPES = [(256, 256)] * 6 + [(256,)] * 4
LARGEST = 4 * 256 * 256  # bytes
OPTIMIZERS = {
    "Adam": (lambda: keras.optimizers.Adam(1e-3), 1.11),
    "SGD": (lambda: keras.optimizers.SGD(1e-3, momentum=0.9), 1.2),
}
CLIPPED = {
    "clipnorm": (lambda: keras.optimizers.Adam(1e-3, clipnorm=1.0), 1.11),
    "global_clipnorm": (lambda: keras.optimizers.Adam(1e-3, global_clipnorm=1.0), 1.11),
}


def started(optimizer):
    variables = [keras.Variable(np.ones(shape, "float32")) for shape in SHAPES]
    optimizer.build(variables)
    return variables, tensors(*(np.ones(shape, "float32") for shape in SHAPES))


@pytest.mark.backend("jax")
@pytest.mark.parametrize(
    ("make", "ratio"), [*OPTIMIZERS.values(), *CLIPPED.values()], ids=[*OPTIMIZERS, *CLIPPED]
)
def test_xla_reads_the_gradients_once_more_and_copies_none(make, ratio):
    import jax

    def compiled(optimizer, scale=None):
        variables, grads = started(optimizer)

        def step(weights, state, grads):
            if scale is not None:
                pairs = zip(optimizer.variables, state, strict=True)
                state = [scale if v is optimizer.dynamic_scale else value for v, value in pairs]
            return optimizer.stateless_apply(state, grads, weights)

        # XLA reuses donated buffers if results come in the order of the arguments.
        given = [v.value for v in variables], [v.value for v in optimizer.variables], grads
        return jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()

    # XLA counts the costlier of two branches, for scales below 1, unless the scale is constant.
    ours, plain = compiled(mp.LossScaleOptimizer(make()), scale=2.0**15), compiled(make())
    moved = [each.cost_analysis()["bytes accessed"] for each in (ours, plain)]
    assert moved[0] <= ratio * moved[1]
    held = compiled(mp.LossScaleOptimizer(make())).memory_analysis().temp_size_in_bytes
    assert held < LARGEST


@pytest.mark.backend("torch")
@pytest.mark.parametrize("make", [make for make, _ in OPTIMIZERS.values()], ids=OPTIMIZERS)
def test_torch_holds_no_more_than_the_largest_tensor(make):
    from torch.profiler import ProfilerActivity, profile

    optimizer = mp.LossScaleOptimizer(make())
    variables, grads = started(optimizer)
    optimizer.apply(grads, variables)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.apply(grads, variables)
    # Allocations and deallocations in order.
    taken = [
        event.nbytes()
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert len(taken) > len(SHAPES)
    assert max(np.cumsum(taken)) < 1.1 * LARGEST


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("decay", [None, 0.1])
def test_tensorflow_divides_no_gradient_before_the_last_large_one_is_applied(decay):
    import tensorflow as tf

    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3, weight_decay=decay))
    variables, grads = started(optimizer)
    step = tf.function(lambda: optimizer.apply(grads, variables)).get_concrete_function()
    functions = step.graph.as_graph_def().library.function
    (applying,) = (f for f in functions if any(n.op == "ResourceApplyAdam" for n in f.node_def))
    nodes = {node.name: node for node in applying.node_def}

    def waits(kind):
        """Return, for each node of a kind, the nodes that its last input depends on."""
        taken = [
            [name for name in node.input if name[0] != "^"][-1]
            for node in nodes.values()
            if node.op == kind
        ]
        return [waited_for(nodes[name.split(":")[0]]) for name in taken]

    def waited_for(node):
        """Return the nodes that a node depends on, directly or through its inputs."""
        before = [nodes[name.split(":")[0]] for name in node.input if name.split(":")[0] in nodes]
        found = [name for each in (node, *before) for name in each.input if name[0] == "^"]
        return {name[1:] for name in found}

    updates = [node.name for node in nodes.values() if node.op == "ResourceApplyAdam"]
    large = len([shape for shape in SHAPES if len(shape) > 1])
    assert len(updates) == len(SHAPES)
    for kind in ["ResourceApplyAdam"] + ["AssignSubVariableOp"] * (decay is not None):
        pairs = zip(updates[:large], waits(kind)[1 : large + 1], strict=True)
        assert all(update in wait for update, wait in pairs)
