"""All layers inside a model, at any depth, and what its graph says."""


def flatten_layers(model):
    """Return the model itself and all layers inside; public `layers` shows one level only."""
    return list(model._flatten_layers())
