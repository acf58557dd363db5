"""How many operations a step that is fine runs on TensorFlow: times vary, these do not."""

import keras
import numpy as np
import pytest

import kerasmp as mp
from helpers.stepping import variables_of

VARIABLES = 40
IDLE = {"Const", "Placeholder", "Identity", "NoOp"}


def operations(optimizer):
    """Return how many operations a good step runs, those of the branch taken included."""
    import tensorflow as tf

    variables = variables_of(*np.ones((VARIABLES, 3)))
    optimizer.build(variables)

    @tf.function
    def step(grads):
        optimizer.apply(grads, variables)

    grads = [tf.TensorSpec((3,)) for _ in variables]
    graph = step.get_concrete_function(grads).graph.as_graph_def()
    taken = [f for f in graph.library.function if "_false" not in f.signature.name]
    nodes = [*graph.node, *(node for function in taken for node in function.node_def)]
    return sum(node.op not in IDLE for node in nodes)


@pytest.mark.backend("tensorflow")
def test_a_good_step_adds_fewer_operations_than_stock_keras_does():
    plain = operations(keras.optimizers.Adam(1e-3))
    stock = operations(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-3)))
    ours = operations(mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3)))
    # A division and half a check for each gradient, where stock Keras reads the scale and checks
    # in two.
    assert ours - plain < 3 * VARIABLES < 4 * VARIABLES < stock - plain
