"""All layers inside a model, at any depth."""


def flatten_layers(model):
    """Return the model and all layers inside; the public `layers` has one level only."""
    return list(model._flatten_layers())
