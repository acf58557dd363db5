"""All layers inside a model, at any depth, and what its graph says."""

import keras


def flatten_layers(model):
    """Return the model itself and all layers inside; public `layers` shows one level only."""
    return list(model._flatten_layers())


def symbolic_dtypes(model):
    """Return the dtypes of all symbolic tensors in a model's own graph, by depth."""
    graph = model._functional if isinstance(model, keras.Sequential) else model
    by_depth = getattr(graph, "_nodes_by_depth", {})
    return [
        tensor.dtype
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        for tensor in node.output_tensors
    ]
