"""Finds constants that are infinite in float16 in the graph of a traced model.

Torch has no such graph. This module is imported on every backend, so its functions import the
framework that they need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np

LARGEST = 65504.0

_ARITHMETIC = {
    "tensorflow": {"Add", "AddV2", "BatchMatMulV2", "BiasAdd", "Einsum", "MatMul", "Mul", "Sub"}
    | {"RealDiv", "SquaredDifference"},
    "jax": {"add", "div", "dot_general", "mul", "sub"},
}
_CHOICE = {"tensorflow": {"Select", "SelectV2"}, "jax": {"select_n"}}
_PASSES_THROUGH = {
    "tensorflow": {"BroadcastTo", "ExpandDims", "Fill", "Identity", "Reshape", "Tile"},
    "jax": {"broadcast_in_dim", "copy", "expand_dims", "reshape", "squeeze", "transpose"},
}


class Constant(NamedTuple):
    """A constant that is infinite in float16.

    Args:
        scope: The name scope in which it is used.
        value: Its value: inf, -inf, or a number that becomes infinite.
        chosen: Whether it is only selected (`where`), not computed with.
    """

    scope: str
    value: float
    chosen: bool


def infinite_constants(model: Any, x: Any) -> list[Constant] | None:
    """Return the infinite float16 constants that a model computes with or selects.

    Args:
        model: A built model.
        x: A batch of inputs.

    Returns:
        The constants, each once; None if the backend has no graph.
    """
    read = {"tensorflow": _in_tensorflow, "jax": _in_jax}.get(keras.backend.backend())
    if read is None:
        return None
    with np.errstate(over="ignore"):  # an overflow is what this function looks for
        return list(dict.fromkeys(read(model, x)))


def _worst(value: Any) -> float | None:
    """Return the value of largest magnitude if it is infinite in float16, else None."""
    array = np.asarray(value)
    if array.dtype.kind != "f" or not array.size:
        return None
    numbers = array.astype("float64")
    worst = numbers.flat[np.argmax(np.abs(np.nan_to_num(numbers, nan=0.0, posinf=np.inf)))]
    return float(worst) if abs(worst) > LARGEST else None


def _in_tensorflow(model: Any, x: Any) -> list[Constant]:
    import tensorflow as tf

    function = tf.function(lambda inputs: model(inputs, training=True), autograph=False)
    specs = keras.tree.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), x)
    graph = function.get_concrete_function(specs).graph.as_graph_def()
    bodies = [graph.node, *(body.node_def for body in graph.library.function)]
    return [constant for nodes in bodies for constant in _in_nodes(nodes)]


def _in_nodes(nodes: Any) -> list[Constant]:
    import tensorflow as tf

    users: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name.lstrip("^").partition(":")[0], []).append(node)
    arithmetic, choice = _ARITHMETIC["tensorflow"], _CHOICE["tensorflow"]
    found = []
    waiting = _infinite_nodes(nodes)
    while waiting:
        name, worst, is_half = waiting.pop()
        for user in users.get(name, []):
            if user.op in _PASSES_THROUGH["tensorflow"]:
                waiting.append((user.name, worst, is_half))
            elif user.op == "Cast":
                waiting.append((user.name, worst, user.attr["DstT"].type == tf.float16))
            elif is_half and user.op in arithmetic | choice:
                scope = user.name.rpartition("/")[0]
                found.append(Constant(scope, worst, user.op in choice))
    return found


def _infinite_nodes(nodes: Any) -> list[tuple[str, float, bool]]:
    """Return (name, value, whether it is float16) of the constants that float16 cannot hold."""
    import tensorflow as tf

    found = []
    for node in nodes:
        if node.op == "Const" and node.attr["dtype"].type in {tf.float16, tf.float32, tf.float64}:
            worst = _worst(tf.make_ndarray(node.attr["value"].tensor))
            if worst is not None:
                found.append((node.name, worst, node.attr["dtype"].type == tf.float16))
    return found


def _in_jax(model: Any, x: Any) -> list[Constant]:
    import jax

    def forward(values: Any, inputs: Any) -> Any:
        # Not stateless_call, which passes `training` even to models that do not accept it.
        state = zip(model.variables, values, strict=True)
        with keras.StatelessScope(state_mapping=list(state)):
            return model(inputs, training=True)

    closed = jax.make_jaxpr(forward)([variable.value for variable in model.variables], x)
    consts = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    known = {var: worst for var, value in consts if (worst := _worst_array(value)) is not None}
    found: list[Constant] = []
    _walk(closed.jaxpr, known, "", found)
    return found


def _worst_array(value: Any) -> float | None:
    return _worst(value) if hasattr(value, "dtype") and not _is_key(value) else None


def _is_key(value: Any) -> bool:
    return str(value.dtype).startswith("key")


def _walk(jaxpr: Any, known: dict[Any, float], scope: str, found: list[Constant]) -> None:
    """Follow the constants in `known` through a jaxpr and those inside it, and add to `known`."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner_scope = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        values = [(var, _value(var, known)) for var in eqn.invars]
        for inner in inner_jaxprs(eqn.params):
            # Aligned at the end, because a branch has its index first.
            pairs = zip(reversed(inner.invars), reversed(values), strict=False)
            inside = {var: value for var, (_, value) in pairs if value is not None}
            _walk(inner, inside, inner_scope, found)
            outs = zip(eqn.outvars, inner.outvars, strict=False)
            known |= {o: v for o, i in outs if (v := _value(i, inside)) is not None}
        for var, value in values:
            if value is None:
                continue
            if name in _PASSES_THROUGH["jax"] or name == "convert_element_type":
                known[eqn.outvars[0]] = value
            elif _is_half(var) and name in _ARITHMETIC["jax"] | _CHOICE["jax"]:
                found.append(Constant(inner_scope, value, name in _CHOICE["jax"]))


def _value(var: Any, known: dict[Any, float]) -> float | None:
    if hasattr(var, "val"):  # a literal
        return _worst_array(np.asarray(var.val))
    return known.get(var)


def _is_half(var: Any) -> bool:
    return str(var.aval.dtype) == "float16"


def inner_jaxprs(params: Any) -> list[Any]:
    """Return the jaxprs among the parameters of an operation, such as the body of a loop."""
    inner = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else [value]:
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                inner.append(jaxpr)
    return inner
