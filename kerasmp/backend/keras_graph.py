"""The graph of calls inside a model, all private in Keras, and the policies of its layers.

`tests/backend/test_keras_graph.py` fails if one of the private names moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from kerasmp.backend.keras_internals import (
    AutocastScope,
    Functional,
    flatten_layers,
    preserve_names,
)
from kerasmp.backend.side_effects import preserve_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAP = keras.dtype_policies.DTypePolicyMap


class Call(NamedTuple):
    """One call in the graph of a model.

    Args:
        operation: The layer or operation that is called.
        node: Keras's record of the call.
        inputs: The symbolic input tensors.
        outputs: The symbolic output tensors.
    """

    operation: Any
    node: Any
    inputs: list[Any]
    outputs: list[Any]


def children(layer: Any) -> list[Any]:
    """Return the layers directly inside a layer.

    The public `layers` exists on models only, and not for the parts of wrappers or of attention.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))  # noqa: SLF001 - no public way, here and where no other reason is given


def has_call(model: Any) -> bool:
    """Return whether a model defines `call`. Some do not: a GAN calls its parts only."""
    return type(model).call not in {keras.Layer.call, keras.Model.call}


def called_parts(model: Any) -> list[Any]:
    """Return the outermost layers that are called: the model, or its parts if it has no `call`.

    A part without a `call` is replaced by its own parts.
    """
    if has_call(model):
        return [model]
    return [part for child in children(model) for part in called_parts(child)]


def graph_of(model: Any) -> Any | None:
    """Return the functional model that holds the graph of calls, or None if there is no graph.

    A `Sequential` has one inside, as soon as its input shape is known.
    """
    if isinstance(model, Functional):
        return model
    if isinstance(model, keras.Sequential):
        return model._functional  # noqa: SLF001 - its `inputs` are public, its calls are not
    return None


def calls(model: Any) -> list[Call]:
    """Return the calls of a model's graph, from inputs to outputs; empty without a graph."""
    graph = graph_of(model)
    if graph is None:
        return []
    by_depth = graph._nodes_by_depth  # noqa: SLF001
    return [
        Call(node.operation, node, list(node.input_tensors), list(node.output_tensors))
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
    ]


def has_own_call(model: Any) -> bool:
    """Return whether calling a model runs user-defined code, and not just its graph."""
    stock = {"keras", __name__.partition(".")[0]}
    owner = next(cls for cls in type(model).__mro__ if "call" in vars(cls))
    return owner.__module__.partition(".")[0] not in stock


def input_tensors(graph: Any, x: Any) -> list[Any]:
    """Return a batch as a graph takes it: a tensor for each of its inputs, in their dtypes.

    Args:
        graph: What `graph_of` returns.
        x: The batch, as for the model.
    """
    return list(graph._standardize_inputs(x))  # noqa: SLF001 - `call` does more than this


def trace_graph(layer: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any]] | None:
    """Return a model with the graph of the calls that a user-defined layer makes.

    It calls the layer's own layers, and the operations of `keras.ops`. The caller casts the inputs,
    and sets an `AutocastScope` for the operations, as calling the layer would do.

    Args:
        layer: A built layer or model.
        args: Positional arguments of its `call`, tensors in any structure.
        kwargs: Keyword arguments, likewise.

    Returns:
        A functional model with an input for each tensor of the arguments, and its operations that
        compute masks of Masking layers, as in `mask_operations`; None if `call` does
        something that has no symbols, such as using the framework's functions, random numbers,
        `add_loss`, or constants in the layer's dtype.
    """
    inside = flatten_layers(layer)
    before = [(each, len(each._inbound_nodes), len(each._outbound_nodes)) for each in inside]  # noqa: SLF001
    inputs: list[Any] = []

    def symbol(each: Any) -> Any:
        if not keras.ops.is_tensor(each):
            return each
        dtype = keras.backend.standardize_dtype(each.dtype)
        name = f"input_{len(inputs)}"
        inputs.append(keras.Input(batch_shape=tuple(each.shape), dtype=dtype, name=name))
        return inputs[-1]

    try:
        stateless = keras.StatelessScope(collect_losses=True)
        with preserve_names(), preserve_layers(layer), stateless as scope:
            args, kwargs = keras.tree.map_structure(symbol, (args, kwargs))
            with AutocastScope(layer.compute_dtype):
                outputs = layer.call(*args, **kwargs)
            graph = Functional(inputs, outputs, name=layer.name)
            # A variable that changes, such as a seed, would do so once; a tensor that was computed
            # in the layer's dtype would stay in it; a loss would be no output.
            if scope.state_mapping or scope.losses or _has_half_constants(graph):
                return None
            return graph, [x for each in inside for _, x in mask_operations(each)]
    except Exception:  # noqa: BLE001 - a user's code may raise anything on symbols
        return None
    finally:
        for each, inbound, outbound in before:
            del each._inbound_nodes[inbound:]  # noqa: SLF001
            del each._outbound_nodes[outbound:]  # noqa: SLF001


def _has_half_constants(graph: Any) -> bool:
    """Return whether a call in a graph takes a tensor in half precision that no other returned."""
    arguments = [(call.node.arguments.args, call.node.arguments.kwargs) for call in calls(graph)]
    return any(
        keras.ops.is_tensor(each)
        and not isinstance(each, (keras.KerasTensor, keras.Variable))
        and keras.backend.standardize_dtype(each.dtype) in {"float16", "bfloat16"}
        for each in keras.tree.flatten(arguments)
    )


def producer(tensor: Any) -> Any:
    """Return the layer or operation that produces a symbolic tensor."""
    return tensor._keras_history.operation  # noqa: SLF001


def has_mask(tensor: Any) -> bool:
    """Return whether a symbolic tensor has a mask."""
    return getattr(tensor, "_keras_mask", None) is not None


def mask_operations(layer: Any) -> list[tuple[Any, Any]]:
    """Return the operations that compute the mask of a Masking in graphs, for each symbolic call.

    If the next layer has the same dtype, Keras passes it the mask from the symbolic call. Each run
    computes that mask again with these operations, and does not ask the layer.

    Returns:
        Pairs: the cast of the input, or None if there is none, and the comparison with the mask
        value. Empty for a subclass that masks in another way.
    """
    stock, cls = keras.layers.Masking, type(layer)
    if cls.compute_mask is not stock.compute_mask or cls.call is not stock.call:
        return []
    found = []
    for node in layer._inbound_nodes:  # noqa: SLF001
        mask = getattr(node.output_tensors[0], "_keras_mask", None)
        if isinstance(mask, keras.KerasTensor):
            comparison = _node_of(_node_of(mask).input_tensors[0])
            compared = comparison.input_tensors[0]
            is_cast = compared is not node.input_tensors[0]
            found.append((producer(compared) if is_cast else None, comparison.operation))
    return found


def _node_of(tensor: Any) -> Any:
    history = tensor._keras_history  # noqa: SLF001
    return history.operation._inbound_nodes[history.node_index]  # noqa: SLF001


def update_mask_casts(layer: Any) -> None:
    """Set the casts in graphs that belong to a stock Masking to its present compute dtype."""
    for cast, _ in mask_operations(layer):
        if type(cast).__name__ == "Cast":
            cast.dtype = layer.compute_dtype
            cast._auto_config = type(cast._auto_config)(dtype=cast.dtype)  # noqa: SLF001 - for files


def symbolic_dtypes(model: Any, visit: Callable[..., object] | None = None) -> dict[int, str]:
    """Return the dtype of each tensor of a model's graph under its layers' present policies.

    Keras records dtypes when the layers are called, and does not update them.

    Args:
        model: A model. Without a graph it has no tensors.
        visit: Called as `visit(operation, args, kwargs)`, with symbolic arguments, before each
            layer or operation is called here. If it changes policies, the new ones count from there
            on.

    Returns:
        Dtypes by `id(tensor)`, including the tensors of nested models.
    """
    dtypes: dict[int, str] = {}
    for operation, node, inputs, outputs in calls(model):
        nested = graph_of(operation)
        if not inputs:
            now = [tensor.dtype for tensor in outputs]
        elif nested is not None:
            inside = symbolic_dtypes(operation, visit)
            dtypes |= inside
            now = [inside[id(tensor)] for tensor in nested.outputs]
        elif not isinstance(operation, keras.Layer) and all(
            dtypes[id(tensor)] == tensor.dtype for tensor in inputs
        ):
            now = [tensor.dtype for tensor in outputs]
        else:
            now = _dtypes_of_call(operation, node, dtypes, visit)
        dtypes |= {id(tensor): dtype for tensor, dtype in zip(outputs, now, strict=True)}
    return dtypes


def dtypes_of_graphs(model: Any, visit: Callable[..., object] | None = None) -> dict[int, str]:
    """Return `symbolic_dtypes` of all graphs in a model, without side effects on its layers.

    A subclassed model has no graph of its own, and may contain several.

    Args:
        model: A model.
        visit: As for `symbolic_dtypes`.
    """
    dtypes: dict[int, str] = {}
    for outermost in outermost_graphs(model):
        with preserve_layers(outermost):
            dtypes |= symbolic_dtypes(outermost, visit)
    return dtypes


def refresh_symbolic_dtypes(model: Any, dtypes: Mapping[int, str] | None = None) -> None:
    """Update the dtypes of the tensors in a model's graphs to its layers' present policies.

    Args:
        model: A model.
        dtypes: The result of `dtypes_of_graphs`, if it is known already.
    """
    if dtypes is None:
        dtypes = dtypes_of_graphs(model)
    for outermost in outermost_graphs(model):
        for graph in _graphs(outermost):
            for call in calls(graph):
                for tensor in call.outputs:
                    tensor._dtype = dtypes[id(tensor)]  # noqa: SLF001 - `dtype` has no setter


def outermost_graphs(model: Any) -> list[Any]:
    """Return the models with a graph that no other graph calls: the model itself, if it has one."""
    inside = flatten_layers(model)
    called = {id(call.operation) for layer in inside for call in calls(layer)}
    return [layer for layer in inside if graph_of(layer) is not None and id(layer) not in called]


def set_policy(layer: Any, policy: keras.DTypePolicy) -> None:
    """Set the policy of a layer, and of no other layer.

    The public setter writes into a `DTypePolicyMap`, which several layers may share.
    """
    if isinstance(layer.dtype_policy, MAP):
        layer._dtype_policy = policy  # noqa: SLF001
    else:
        layer.dtype_policy = policy


def set_input_dtype(layer: Any, dtype: str) -> None:
    """Set the dtype to which a model casts an input.

    Args:
        layer: An `InputLayer`.
        dtype: The dtype.
    """
    layer._dtype = dtype  # noqa: SLF001 - `dtype` has no setter
    layer.output._dtype = dtype  # noqa: SLF001


def policy_of(layer: Any) -> keras.DTypePolicy:
    """Return the policy that a layer follows; in a `DTypePolicyMap`, the entry for its path."""
    policy = layer.dtype_policy
    if not isinstance(policy, MAP):
        return policy
    return policy[layer.path] if layer.path else policy.default_policy


def _graphs(model: Any) -> list[Any]:
    nested = [graph for call in calls(model) for graph in _graphs(call.operation)]
    graph = graph_of(model)
    return [] if graph is None else [graph, *nested]


def _always_returns_compute_dtype(operation: Any) -> bool:
    """Return whether a symbolic call of a layer always returns its compute dtype.

    If a layer can tell the shapes of its outputs, Keras does not trace its call. A user-defined
    layer is called all the same, because it may reject the dtype of its inputs.
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
    operation: Any, node: Any, dtypes: dict[int, str], visit: Callable[..., object] | None
) -> list[str]:
    """Return the output dtypes of a call that is repeated on new symbolic tensors."""

    def renewed(value: Any) -> Any:
        if not isinstance(value, keras.KerasTensor):
            return value
        return keras.KerasTensor(value.shape, dtypes.get(id(value), value.dtype), value.sparse)

    is_known = _always_returns_compute_dtype(operation)
    if visit is not None or not is_known:
        args, kwargs = keras.tree.map_structure(
            renewed, (node.arguments.args, node.arguments.kwargs)
        )
    if visit is not None:
        visit(operation, args, kwargs)
    if is_known:
        return [operation.compute_dtype] * len(node.output_tensors)
    inbound = operation._inbound_nodes  # noqa: SLF001 - `layer.output` requires that a layer was called once
    before = len(inbound)
    try:
        # Within a scope, a layer casts variables whose dtype differs from its compute dtype, too.
        with AutocastScope("float32"):
            outputs = operation(*args, **kwargs)
    finally:
        del inbound[before:]
    return [tensor.dtype for tensor in keras.tree.flatten(outputs)]
