"""How many operations a good step runs on TensorFlow: times vary, these counts do not."""

import keras
import numpy as np
import pytest
from helpers.marks import marks_on
from helpers.stepping import variables_of

import kerasmp as mp

pytestmark = [pytest.mark.backend("tensorflow"), *marks_on("oldest")]

VARIABLES = 40
IDLE = {"Const", "Placeholder", "Identity", "NoOp"}


def operations(optimizer):
    """Return the number of operations of a good step, including those of the branch taken."""
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


def added_by(cls, make=lambda: keras.optimizers.SGD(1e-3), **settings):
    return operations(cls(make(), **settings)) - operations(make())


def test_a_good_step_adds_a_division_and_half_a_check_for_each_gradient():
    assert added_by(mp.LossScaleOptimizer, fused=False) < 3 * VARIABLES


def test_a_fused_step_of_adam_takes_fewer_operations_than_one_without_scaling():
    assert added_by(mp.LossScaleOptimizer, keras.optimizers.Adam) < -10 * VARIABLES


@pytest.mark.full
def test_stock_keras_adds_more_than_four_operations_for_each_gradient():
    assert added_by(keras.optimizers.LossScaleOptimizer) > 4 * VARIABLES
