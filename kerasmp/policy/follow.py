"""Lets a model follow the rules, of the policy that it is made under, that Keras cannot express."""

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

    Layers that were given a dtype of their own keep it: only those that have the policy's own
    dtypes are changed.

    Args:
        policy: The policy that the model was made under.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.any = any(not what.startswith("output=") for what in policy.beyond_keras)
        self._seen: list[int] = []

    def follow(self, model: Any, *inputs: Any) -> None:
        """Apply the rules, if layers have come since the last time.

        Args:
            model: The model.
            *inputs: What it is about to be called with; builds the model where it is not built.
        """
        if not self.any:
            return
        build_with(model, *inputs)
        present = [id(layer) for layer in flatten_layers(model)]
        if present == self._seen:
            return
        rows = assign(model, self._policy)
        apply(model, [row for row in rows if row.before == self._policy.name])
        self._seen = present  # now: rules that disagree are an error each time


def build_with(model: Any, *inputs: Any) -> None:
    """Build a model that is not, as layers make parts of their own then, attention its softmax.

    Args:
        model: The model. It stays as it is where it cannot be traced.
        *inputs: What it is called with; nothing to leave it as it is.
    """
    if inputs and not model.built:
        # What cannot be traced is built by the call itself, as in Keras, and followed after it.
        with contextlib.suppress(Exception):
            keras.Model.__call__(model, *to_symbolic(inputs))


def to_symbolic(values: Any) -> Any:
    """Return values with symbolic tensors in the place of all that has a shape and a dtype."""
    return keras.tree.map_structure(_symbol, values)


def _symbol(value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return value
    return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))
