"""Applies the rules that Keras cannot express to a model created under a policy with rules."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.policy.apply import apply
from kerasmp.policy.assign import assign

if TYPE_CHECKING:
    from kerasmp.policy.policy import Policy


class RulesToFollow:
    """The rules that one model follows.

    Only layers with the policy's own dtypes change. A layer with a dtype of its own keeps it.

    Args:
        policy: The policy under which the model was created.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.any = any(not what.startswith("output=") for what in policy.beyond_keras)
        self._seen: list[int] = []

    def follow(self, model: Any, *inputs: Any) -> None:
        """Apply the rules if the model has new layers since the last call.

        Args:
            model: The model.
            *inputs: The inputs of the next call, which build a model that is not built.
        """
        if not self.any:
            return
        build_with(model, *inputs)
        layers = [id(layer) for layer in flatten_layers(model)]
        if layers == self._seen:
            return
        rows = assign(model, self._policy)
        apply(model, [row for row in rows if row.before == self._policy.name])
        self._seen = layers  # only now, so that rules that disagree raise an error each time


def build_with(model: Any, *inputs: Any) -> None:
    """Build a model that is not built, so that layers create their parts, such as a softmax.

    Args:
        model: The model. It stays as it is if it cannot be traced.
        *inputs: The inputs of a call; without any, the model stays as it is.
    """
    if inputs and not model.built:
        # A model that cannot be traced is built by its first call, as in Keras.
        with contextlib.suppress(Exception):
            keras.Model.__call__(model, *to_symbolic(inputs))


def to_symbolic(values: Any) -> Any:
    """Return nested values with a symbolic tensor for each value that has a shape and a dtype."""
    return keras.tree.map_structure(_symbol, values)


def _symbol(value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return value
    return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))
