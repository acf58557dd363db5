"""Count casts from float32 to float16 in a traced program, for some shapes."""

import keras


def count(function, inputs, shapes):
    """Return the number of such casts, and the number of those inside a loop.

    Args:
        function: Takes a tensor and returns tensors; on TensorFlow and JAX only.
        inputs: An array.
        shapes: The shapes to count.
    """
    return {"tensorflow": _tensorflow, "jax": _jax}[keras.backend.backend()](
        function, inputs, {tuple(shape) for shape in shapes}
    )


def _tensorflow(function, inputs, shapes):
    import tensorflow as tf
    from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

    graph = tf.function(function).get_concrete_function(inputs).graph
    library = graph.as_graph_def().library
    bodies = [function_def_to_graph(f) for f in library.function if "_body_" in f.signature.name]

    def is_counted(op):
        if op.type != "Cast" or op.outputs[0].dtype != tf.float16:
            return False
        source, shape = op.inputs[0], op.outputs[0].shape
        while source.op.type in {"Identity", "StopGradient"}:
            source = source.op.inputs[0]
        # Bodies of loops have no shapes: there, variables and inputs from outside are counted.
        return source.dtype == tf.float32 and (
            source.op.type in {"ReadVariableOp", "Placeholder"}
            if shape.rank is None
            else tuple(shape) in shapes
        )

    def casts(graph):
        return sum(map(is_counted, graph.get_operations()))

    inside = sum(map(casts, bodies))
    return casts(graph) + inside, inside


def _jax(function, inputs, shapes):
    import jax

    def inner(params):
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            yield from [leaf.jaxpr] if hasattr(leaf, "jaxpr") else []

    def casts(jaxpr, looping):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "convert_element_type":
                (source,), (result,) = equation.invars, equation.outvars
                dtypes = (source.aval.dtype.name, result.aval.dtype.name)
                if dtypes == ("float32", "float16") and result.aval.shape in shapes:
                    yield looping
            for body in inner(equation.params):
                yield from casts(body, looping or equation.primitive.name in {"scan", "while"})

    found = list(casts(jax.make_jaxpr(function)(inputs).jaxpr, looping=False))
    return len(found), sum(found)
