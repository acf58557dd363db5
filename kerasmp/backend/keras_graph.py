"""The graph of calls inside a model, all of it private in Keras, and the policies of its layers.

`tests/backend/test_keras_graph.py` tells when one of the private names moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from kerasmp.backend.keras_internals import (
    AutocastScope,
    Functional,
    flatten_layers,
    preserve_layers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAP = keras.dtype_policies.DTypePolicyMap


class Call(NamedTuple):
    """One call in the graph of a model.

    Args:
        operation: The layer or operation that is called.
        node: Keras's record of the call.
        inputs: The symbolic tensors that go in.
        outputs: The symbolic tensors that come out.
    """

    operation: Any
    node: Any
    inputs: list[Any]
    outputs: list[Any]


def children(layer: Any) -> list[Any]:
    """Return the layers directly inside a layer.

    Public `layers` exists on models alone, and not for the parts of wrappers or of attention.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))  # noqa: SLF001 - no public way


def has_call(model: Any) -> bool:
    """Return whether a model has a `call`; a GAN, say, has none."""
    return type(model).call not in {keras.Layer.call, keras.Model.call}


def called_parts(model: Any) -> list[Any]:
    """Return what calls begin with: the model, or its parts if it has no `call`.

    A part without one stands for its own parts.
    """
    if has_call(model):
        return [model]
    return [part for child in children(model) for part in called_parts(child)]


def graph_of(model: Any) -> Any | None:
    """Return the functional model that holds the graph of calls, or None if there is no graph.

    A `Sequential` keeps one inside, once it knows the shape of its input.
    """
    if isinstance(model, Functional):
        return model
    if isinstance(model, keras.Sequential):
        return model._functional  # noqa: SLF001 - its `inputs` are public, its calls are not
    return None


def calls(model: Any) -> list[Call]:
    """Return the calls of a model's graph, from the inputs to the outputs; none without a graph."""
    graph = graph_of(model)
    if graph is None:
        return []
    by_depth = graph._nodes_by_depth  # noqa: SLF001 - no public way to the calls
    return [
        Call(node.operation, node, list(node.input_tensors), list(node.output_tensors))
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
    ]


def producer(tensor: Any) -> Any:
    """Return the layer or operation that a symbolic tensor comes from."""
    return tensor._keras_history.operation  # noqa: SLF001 - no public way


def has_mask(tensor: Any) -> bool:
    """Return whether a mask comes with a symbolic tensor."""
    return getattr(tensor, "_keras_mask", None) is not None


def mask_operations(layer: Any) -> list[tuple[Any, Any]]:
    """Return what graphs keep of the mask of a Masking, for each of its calls with symbols.

    Where the layer after it has the same dtype, Keras hands it the mask that was computed with the
    symbols, and in each run computes that again by these operations: the layer is not asked.

    Returns:
        Pairs of the cast of the input, None if there is none, and the comparison with the value.
        None of a class derived from Keras's that masks in another way.
    """
    stock, cls = keras.layers.Masking, type(layer)
    if cls.compute_mask is not stock.compute_mask or cls.call is not stock.call:
        return []
    found = []
    for node in layer._inbound_nodes:  # noqa: SLF001 - no public way to the calls
        mask = getattr(node.output_tensors[0], "_keras_mask", None)
        if isinstance(mask, keras.KerasTensor):
            comparison = _node_of(_node_of(mask).input_tensors[0])
            compared = comparison.input_tensors[0]
            is_cast = compared is not node.input_tensors[0]
            found.append((producer(compared) if is_cast else None, comparison.operation))
    return found


def _node_of(tensor: Any) -> Any:
    history = tensor._keras_history  # noqa: SLF001 - see `producer`
    return history.operation._inbound_nodes[history.node_index]  # noqa: SLF001


def update_mask_casts(layer: Any) -> None:
    """Let the casts that graphs keep of a stock Masking follow its present policy."""
    for cast, _ in mask_operations(layer):
        if type(cast).__name__ == "Cast":
            cast.dtype = layer.compute_dtype
            cast._auto_config = type(cast._auto_config)(dtype=cast.dtype)  # noqa: SLF001 - for files


def symbolic_dtypes(model: Any, look: Callable[..., object] | None = None) -> dict[int, str]:
    """Return the dtype that each tensor of a model's graph has under its layers' present policies.

    Keras notes the dtypes when the layers are called, and never again.

    Args:
        model: A model; one without a graph has no tensors.
        look: Is given each layer or operation, before it is called here, with symbolic arguments: a
            tuple and a dict. What it changes of policies counts from there on.

    Returns:
        From `id(tensor)` to a dtype. Of a nested model's tensors, too.
    """
    dtypes: dict[int, str] = {}
    for operation, node, inputs, outputs in calls(model):
        nested = graph_of(operation)
        if not inputs:
            now = [tensor.dtype for tensor in outputs]
        elif nested is not None:
            inside = symbolic_dtypes(operation, look)
            dtypes |= inside
            now = [inside[id(tensor)] for tensor in nested.outputs]
        elif not isinstance(operation, keras.Layer) and all(
            dtypes[id(tensor)] == tensor.dtype for tensor in inputs
        ):
            now = [tensor.dtype for tensor in outputs]
        else:
            now = _dtypes_of_call(operation, node, dtypes, look)
        dtypes |= {id(tensor): dtype for tensor, dtype in zip(outputs, now, strict=True)}
    return dtypes


def dtypes_of_graphs(model: Any, look: Callable[..., object] | None = None) -> dict[int, str]:
    """Return what `symbolic_dtypes` does, of all graphs in a model, and leave no trace in layers.

    A user's model has no graph, and may hold several.

    Args:
        model: A model.
        look: As for `symbolic_dtypes`.
    """
    dtypes: dict[int, str] = {}
    for outermost in outermost_graphs(model):
        with preserve_layers(outermost):
            dtypes |= symbolic_dtypes(outermost, look)
    return dtypes


def refresh_symbolic_dtypes(model: Any, dtypes: Mapping[int, str] | None = None) -> None:
    """Let the tensors of a model's graphs say the dtypes that the layers' present policies give.

    Args:
        model: A model.
        dtypes: What `dtypes_of_graphs` says of it, where that is known.
    """
    if dtypes is None:
        dtypes = dtypes_of_graphs(model)
    for outermost in outermost_graphs(model):
        for graph in _graphs(outermost):
            for call in calls(graph):
                for tensor in call.outputs:
                    tensor._dtype = dtypes[id(tensor)]  # noqa: SLF001 - `dtype` refuses to be set


def outermost_graphs(model: Any) -> list[Any]:
    """Return the models with a graph that no other graph calls: the model itself, if it has one."""
    inside = flatten_layers(model)
    called = {id(call.operation) for layer in inside for call in calls(layer)}
    return [layer for layer in inside if graph_of(layer) is not None and id(layer) not in called]


def set_policy(layer: Any, policy: keras.DTypePolicy) -> None:
    """Give a layer a policy, and no other layer.

    The public setter writes into a `DTypePolicyMap`, which all layers that were given it share.
    """
    if isinstance(layer.dtype_policy, MAP):
        layer._dtype_policy = policy  # noqa: SLF001 - see above
    else:
        layer.dtype_policy = policy


def set_input_dtype(layer: Any, dtype: str) -> None:
    """Let an input have a dtype, to which its model casts what it is given.

    Args:
        layer: An `InputLayer`.
        dtype: The dtype.
    """
    layer._dtype = dtype  # noqa: SLF001 - `dtype` refuses to be set
    layer.output._dtype = dtype  # noqa: SLF001 - nor the tensor's


def policy_of(layer: Any) -> keras.DTypePolicy:
    """Return the policy that a layer follows: of a `DTypePolicyMap`, the member for its path."""
    policy = layer.dtype_policy
    if not isinstance(policy, MAP):
        return policy
    return policy[layer.path] if layer.path else policy.default_policy


def _graphs(model: Any) -> list[Any]:
    nested = [graph for call in calls(model) for graph in _graphs(call.operation)]
    graph = graph_of(model)
    return [] if graph is None else [graph, *nested]


def _gives_its_compute_dtype(operation: Any) -> bool:
    """Return whether a call with symbols gives the dtype that a layer computes in, in any case.

    Keras asks layers that say the shapes of their outputs for these alone. A user's layer is called
    all the same: it may refuse the dtype of what it is given.
    """
    cls, layer = type(operation), keras.Layer
    return (
        cls.__module__.partition(".")[0] in {"keras", __name__.partition(".")[0]}
        and isinstance(operation, layer)
        and cls.compute_output_shape is not layer.compute_output_shape
        and cls.compute_output_spec is layer.compute_output_spec
        and cls.__call__ is layer.__call__
    )


def _dtypes_of_call(
    operation: Any, node: Any, dtypes: dict[int, str], look: Callable[..., object] | None
) -> list[str]:
    """Call once more on new symbolic tensors, and leave no trace of it."""

    def anew(value: Any) -> Any:
        if not isinstance(value, keras.KerasTensor):
            return value
        return keras.KerasTensor(value.shape, dtypes.get(id(value), value.dtype), value.sparse)

    is_known = _gives_its_compute_dtype(operation)
    if is_known and look is None:
        return [operation.compute_dtype] * len(node.output_tensors)
    args, kwargs = keras.tree.map_structure(anew, (node.arguments.args, node.arguments.kwargs))
    if look is not None:
        look(operation, args, kwargs)
    if is_known:
        return [operation.compute_dtype] * len(node.output_tensors)
    inbound = operation._inbound_nodes  # noqa: SLF001 - `layer.output` counts on one call each
    before = len(inbound)
    try:
        # With a scope around it, a layer reads variables that have another dtype in its own, too.
        with AutocastScope("float32"):
            outputs = operation(*args, **kwargs)
    finally:
        del inbound[before:]
    return [tensor.dtype for tensor in keras.tree.flatten(outputs)]
