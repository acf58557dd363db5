"""Which attributes are set while something runs, also those that are put back before it ends."""

import contextlib
import sys

import keras.src.backend as keras_backend
from helpers.flattened import flatten_layers

_MISSING = object()
_PACKAGES = {"keras", "kerasmp"}


@contextlib.contextmanager
def changes(*layers):
    """Yield the set of what changes, as "Class.attribute", filled as long as this lasts.

    Looked at are the layers, all inside them, their classes and regularizers, and the functions
    that Keras computes by, whenever a function of Keras or of ours begins or ends in this thread.
    """
    watched = [(name, live, dict(live)) for name, live in _held(layers)]
    found = set()

    def look():
        for name, live, before in watched:
            if not _same(live, before):
                for key in {*live, *before}:
                    if live.get(key, _MISSING) is not before.get(key, _MISSING):
                        found.add(f"{name}.{key}")

    def profile(frame, event, _):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if event in {"call", "return"} and package in _PACKAGES:
            look()

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)
    look()


def _held(layers):
    everything = {id(part): part for layer in layers for part in flatten_layers(layer)}.values()
    for part in everything:
        yield type(part).__name__, vars(part)
        regularizer = getattr(part, "activity_regularizer", None)
        if hasattr(regularizer, "__dict__"):
            yield type(regularizer).__name__, vars(regularizer)
    classes = {cls for part in everything for cls in type(part).__mro__ if cls is not object}
    for of_keras in (*classes, keras_backend.AutocastScope):
        yield of_keras.__name__, vars(of_keras)
    for module in (keras_backend, keras_backend.numpy, keras_backend.nn, keras_backend.core):
        yield module.__name__, vars(module)


def _same(live, before):
    with contextlib.suppress(Exception):  # of two arrays no one bool says whether they are equal
        return live == before
    return False
