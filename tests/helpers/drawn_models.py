"""Build models from recipes, which are plain data and always give the same model.

All tensors between the inputs and the heads have the shape (2, 3, 4), so that any part can follow
any other.
"""

import contextlib
from typing import Any, NamedTuple

import keras
import numpy as np
from helpers import drawn_layers
from helpers.drawn_layers import FEATURES, STEPS, Part
from keras import ops

import kerasmp as mp

layers = keras.layers
BATCH = 2


class Head(NamedTuple):
    """The layers that make one output: one that may end the sequence, then perhaps a Dense.

    Args:
        kind: "last", "flat", "pool" or "whole", which keeps the sequence.
        activation: The activation of the Dense; None for no Dense.
        back: The distance of its input from the last tensor.
    """

    kind: str
    activation: str | None = "linear"
    back: int = 0


class Recipe(NamedTuple):
    """The description of a model.

    Args:
        shape: "functional", "sequential", "deferred" (a Sequential without Input) or "subclassed".
        inputs: "float" or "tokens" for each input.
        form: "one", "list" or "dict": the structure of inputs and outputs.
        parts: The layers and operations between inputs and heads.
        heads: One for each output.
    """

    shape: str
    inputs: tuple[str, ...]
    form: str
    parts: tuple[Part, ...]
    heads: tuple[Head, ...]

    @classmethod
    def read(cls, data):
        """Return the recipe that JSON data describes."""
        shape, inputs, form, parts, heads = data
        parts = tuple(map(Part.read, parts))
        return cls(shape, tuple(inputs), form, parts, tuple(Head(*head) for head in heads))


def build(recipe, policy="float32", *, ours=False):
    """Return the model of a recipe, always with the same weights.

    Args:
        recipe: The recipe.
        policy: The global policy to build under; None for the current one.
        ours: Whether to build a kerasmp model.
    """
    before = keras.config.dtype_policy()
    if policy is not None:
        keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    try:
        model = _KINDS[recipe.shape](recipe, mp if ours else keras)
        # Symbolic, since JAX would compile an eager call.
        model(keras.tree.map_structure(_symbol, data(recipe)))
    finally:
        keras.config.set_dtype_policy(before)
    _fill(model)
    return model


def fresh(recipe, policy="float32", *, ours=False):
    """Build like `build`, with layer names as if no model had been built before."""
    current = keras.config.dtype_policy()
    keras.backend.clear_session(free_memory=False)
    keras.config.set_dtype_policy(current)
    return build(recipe, policy, ours=ours)


def data(recipe):
    """Return a batch whose last step is zero, for layers that mask."""
    rng = np.random.default_rng(0)
    values = []
    for kind in recipe.inputs:
        shape = (BATCH, STEPS, FEATURES) if kind == "float" else (BATCH, STEPS)
        value = rng.normal(size=shape) if kind == "float" else rng.integers(1, 5, size=shape)
        value[1, -1] = 0
        values.append(value.astype("float32" if kind == "float" else "int32"))
    return _formed(recipe.form, values, "x")


def _quick():
    """Return a context in which JAX does not compile the loops of recurrent layers."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.disable_jit()


def targets(model, recipe):
    """Return targets for training: zeros in the structure of the outputs."""
    with _quick():
        found = keras.tree.flatten(model(data(recipe)))
    zeros = [np.zeros(out.shape, "float32") for out in found]
    return _formed(recipe.form, zeros, "y") if len(zeros) > 1 else zeros[0]


def _symbol(value):
    return keras.KerasTensor(value.shape, str(value.dtype))


def _fill(model):
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape, scale=0.5).astype("float32"))


def _formed(form, values, name):
    if form == "dict":
        return {f"{name}{i}": value for i, value in enumerate(values)}
    return list(values) if form == "list" else values[0]


def _input(kind, name):
    shape = (STEPS, FEATURES) if kind == "float" else (STEPS,)
    return keras.Input(shape, name=name, dtype="float32" if kind == "float" else "int32")


def _entry(kind):
    """Return the layer that gives an input the shape (2, 3, 4); None if it has that shape."""
    return layers.Embedding(5, FEATURES, mask_zero=True) if kind == "tokens" else None


class _Insides:
    """All layers of a recipe, called in order."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.entries = [_entry(kind) for kind in recipe.inputs]
        self.join = layers.Add() if len(recipe.inputs) > 1 else None
        self.parts = drawn_layers.make_all(recipe.parts)
        self.heads = [_head(head) for head in recipe.heads]

    @property
    def all(self):
        """All layers, in the order of calls."""
        each = [*self.entries, self.join, *self.parts, *(x for head in self.heads for x in head)]
        return [layer for layer in each if layer is not None]

    def __call__(self, inputs):
        values = [inputs[name] for name in sorted(inputs)] if isinstance(inputs, dict) else inputs
        values = values if isinstance(values, list | tuple) else [values]
        tensors = [
            x if entry is None else entry(x) for x, entry in zip(values, self.entries, strict=True)
        ]
        if self.join is not None:
            tensors.append(self.join(tensors))
        tensors = drawn_layers.run(self.recipe.parts, self.parts, tensors)
        outputs = []
        for head, made in zip(self.recipe.heads, self.heads, strict=True):
            x = tensors[-1 - head.back % len(tensors)]
            for layer in made:
                x = layer(x)
            outputs.append(x)
        return _formed(self.recipe.form, outputs, "y") if len(outputs) > 1 else outputs[0]


def _head(head):
    ends: dict[str, Any] = {
        "last": lambda: [layers.GRU(FEATURES)],
        "flat": lambda: [layers.Flatten()],
        "pool": lambda: [layers.GlobalAveragePooling1D()],
        "whole": lambda: [] if head.activation else [layers.ReLU()],
    }
    dense = [] if head.activation is None else [layers.Dense(2, activation=head.activation)]
    return ends[head.kind]() + dense


def _functional(recipe, module):
    inside = _Insides(recipe)
    inputs = [_input(kind, f"x{i}") for i, kind in enumerate(recipe.inputs)]
    given = _formed(recipe.form, inputs, "x")
    return module.Model(given, inside(given))


def _sequential(recipe, module):
    entry = _input(recipe.inputs[0], "x0")
    return module.Sequential([entry, *_Insides(recipe).all])


def _deferred(recipe, module):
    return module.Sequential(_Insides(recipe).all)


def _subclassed(recipe, module):
    return {keras: Net, mp: OurNet}[module](recipe)


class _Net:
    def __init__(self, recipe, **kwargs):
        super().__init__(**kwargs)
        self.recipe = tuple(recipe)  # Keras would track a NamedTuple's lists
        self.inside = _Insides(Recipe.read(recipe))
        self.parts = self.inside.all

    def call(self, inputs):
        return self.inside(inputs)

    def get_config(self):
        return {**super().get_config(), "recipe": self.recipe}


@keras.saving.register_keras_serializable("drawn_models")
class Net(_Net, keras.Model):
    """A user-defined stock model."""


@keras.saving.register_keras_serializable("drawn_models")
class OurNet(_Net, mp.Model):
    """A user-defined kerasmp model."""


_KINDS = {
    "functional": _functional,
    "sequential": _sequential,
    "deferred": _deferred,
    "subclassed": _subclassed,
}


def outputs(model, recipe):
    """Return the dtype and the bytes of each output of an eager call."""
    with _quick():
        found = keras.tree.flatten(model(data(recipe)))
    return [
        (
            keras.backend.standardize_dtype(x.dtype),
            ops.convert_to_numpy(ops.cast(x, "float32")).tobytes(),
        )
        for x in found
    ]
