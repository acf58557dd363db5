"""Fails if TensorFlow no longer knows in a trace that XLA will compile the function."""

import pytest

pytestmark = pytest.mark.backend("tensorflow")


@pytest.mark.parametrize("jit_compile", [True, False, None])
def test_a_trace_knows_whether_xla_will_compile_it(jit_compile):
    import tensorflow as tf
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    seen = []

    @tf.function(jit_compile=jit_compile)
    def function(x):
        def branch():
            seen.append(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))
            return x

        return tf.cond(x > 0, branch, lambda: -x)

    function(tf.constant(1.0))
    assert seen == [bool(jit_compile)]
    assert not GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
