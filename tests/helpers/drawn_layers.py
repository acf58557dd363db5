"""The parts of the models in `helpers.drawn_models`: layers that map (2, 3, 4) to (2, 3, 4)."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

layers = keras.layers
STEPS, FEATURES = 3, 4
ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)


class Part(NamedTuple):
    """One layer, or one operation.

    Args:
        kind: A key of `MAKERS`, "again", "borrow" or "op".
        option: The option of the kind: for "again" which earlier layer is called once more, for
            "borrow" which earlier layer a user-defined layer holds too.
        inner: The parts inside.
        dtype: The policy of the part, if it differs from the global one.
        back: The distance of its input from the last tensor.
    """

    kind: str
    option: Any = None
    inner: tuple["Part", ...] = ()
    dtype: str | None = None
    back: int = 0

    @classmethod
    def read(cls, data):
        """Return the part that JSON data describes."""
        kind, option, inner, dtype, back = data
        option = tuple(option) if isinstance(option, list) else option
        return cls(kind, option, tuple(map(cls.read, inner)), dtype, back)


def make(part):
    """Return the layer of a part; None if the part makes none."""
    if part.kind in {"again", "op"}:
        return None
    arguments = {} if part.dtype is None else {"dtype": part.dtype}
    return MAKERS[part.kind](part, **arguments)


def make_all(parts):
    """Return the layer of each part; one that borrows also holds an earlier layer."""
    made = []
    for part in parts:
        borrows = part.kind == "borrow"
        made.append(Borrower(_earlier(made, part.option)) if borrows else make(part))
    return made


def run(parts, made, tensors):
    """Return the given tensors followed by the output of each part.

    Args:
        parts: The parts.
        made: The layer of each, from `make_all`.
        tensors: The tensors to begin with.
    """
    tensors = list(tensors)
    for part, layer in zip(parts, made, strict=True):
        x = tensors[-1 - part.back % len(tensors)]
        if part.kind == "op":
            tensors.append(OPERATIONS[part.option](x, tensors[-1]))
        elif part.kind == "again":
            tensors.append(call(_earlier(made, part.option), x, tensors))
        else:
            tensors.append(call(layer, x, tensors))
    return tensors


def call(layer, x, tensors):
    """Call a layer with the inputs that its class expects."""
    if layer is None:
        return x
    if isinstance(layer, ATTENTION):
        return layer(x, x)
    return layer([x, tensors[0]]) if isinstance(layer, MERGING) else layer(x)


def _earlier(made, number):
    found = [layer for layer in made if layer is not None]
    return found[number % len(found)] if found else None


def build_all(made, shape):
    """Build layers that are called one after the other."""
    for layer in made:
        if isinstance(layer, ATTENTION):
            layer.build(shape, shape)
        elif isinstance(layer, MERGING):
            layer.build([shape, shape])
        elif layer is not None and not layer.built:
            layer.build(shape)


class _Chain:
    def __init__(self, parts, **kwargs):
        super().__init__(**kwargs)
        self.recipe = tuple(map(tuple, parts))
        self.inside = make_all(self._read)
        self.parts = [layer for layer in self.inside if layer is not None]

    @property
    def _read(self):
        return [Part.read(part) for part in self.recipe]

    def build(self, shape):
        build_all(self.parts, tuple(shape))

    def call(self, x):
        return run(self._read, self.inside, [x])[-1]

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return {**super().get_config(), "parts": self.recipe}


class Borrower(layers.Layer):
    """A user's layer that holds what is held elsewhere, too; no file can say so."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def build(self, shape):
        build_all([self.part], tuple(shape))

    def call(self, x):
        return call(self.part, x, [x])


@keras.saving.register_keras_serializable("drawn_models")
class Block(_Chain, layers.Layer):
    """A user-defined layer with layers in a list."""


@keras.saving.register_keras_serializable("drawn_models")
class Inner(_Chain, keras.Model):
    """A user-defined model inside another."""


def _functional(part, **_):
    x = keras.Input((STEPS, FEATURES))
    return keras.Model(x, run(part.inner, make_all(part.inner), [x])[-1])


def _sequential(part, **_):
    return keras.Sequential([keras.Input((STEPS, FEATURES)), *map(make, part.inner)])


def _normalization(part, **arguments):
    if part.option:
        given = {"mean": [0.3] * FEATURES, "variance": [0.7] * FEATURES}
        layer = layers.Normalization(**given, **arguments)
        # If Keras builds it while it traces a subclassed model on torch, the mean is uninitialised
        # memory.
        layer.build((None, STEPS, FEATURES))
        return layer
    layer = layers.Normalization(**arguments)
    layer.adapt(np.random.default_rng(2).normal(size=(9, STEPS, FEATURES)).astype("float32"))
    return layer


def _cells(part, **arguments):
    units = [3] * (len(part.option) - 1) + [FEATURES]
    cells = [CELLS[name](count) for name, count in zip(part.option, units, strict=True)]
    return layers.RNN(cells if len(cells) > 1 else cells[0], return_sequences=True, **arguments)


def _wrapped(wrapper):
    return lambda part, **arguments: wrapper(make(part.inner[0]), **arguments)


def _activated(cls, *given, **fixed):
    return lambda part, **arguments: cls(*given, activation=part.option, **fixed, **arguments)


def _plain(cls, *given, **fixed):
    return lambda _, **arguments: cls(*given, **fixed, **arguments)


CELLS = {
    "lstm": layers.LSTMCell,
    "gru": layers.GRUCell,
    "simple": layers.SimpleRNNCell,
}
RECURRENT = {"lstm": layers.LSTM, "gru": layers.GRU, "simple": layers.SimpleRNN}
MERGERS = {
    "add": layers.Add,
    "average": layers.Average,
    "multiply": layers.Multiply,
    "maximum": layers.Maximum,
}
MERGING = tuple(MERGERS.values())
OPERATIONS = {
    "double": lambda x, _: x * 2,
    "float32": lambda x, _: ops.cast(x, "float32"),
    "add": lambda x, last: x + last,
}
MAKERS = {
    "dense": _activated(layers.Dense, FEATURES),
    "einsum": _activated(layers.EinsumDense, "abc,cd->abd", (STEPS, FEATURES), bias_axes="d"),
    "conv": _activated(layers.Conv1D, FEATURES, 2, padding="same"),
    "dropout": lambda part, **arguments: layers.Dropout(part.option, seed=1, **arguments),
    "layer_norm": _plain(layers.LayerNormalization),
    "batch_norm": _plain(layers.BatchNormalization),
    "unit_norm": _plain(layers.UnitNormalization),
    "normalization": _normalization,
    "rescaling": _plain(layers.Rescaling, 1 / 3, offset=0.1),
    "activation": lambda part, **arguments: layers.Activation(part.option, **arguments),
    "softmax": _plain(layers.Softmax),
    "relu": _plain(layers.ReLU),
    "masking": _plain(layers.Masking),
    "mha": _plain(layers.MultiHeadAttention, 2, 2),
    "gqa": _plain(layers.GroupQueryAttention, 2, 4, 2),
    "bidirectional": lambda part, **arguments: layers.Bidirectional(
        RECURRENT[part.option](FEATURES // 2, return_sequences=True), **arguments
    ),
    "recurrent": lambda part, **arguments: RECURRENT[part.option](
        FEATURES, return_sequences=True, **arguments
    ),
    "cells": _cells,
    "time": _wrapped(layers.TimeDistributed),
    "spectral": _wrapped(layers.SpectralNormalization),
    "merge": lambda part, **arguments: MERGERS[part.option](**arguments),
    "block": lambda part, **arguments: Block(part.inner, **arguments),
    "inner": lambda part, **_: Inner(part.inner),
    "functional": _functional,
    "sequential": _sequential,
}
