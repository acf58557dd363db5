"""Lets a model follow the rules, of the policy that it is made under, that Keras cannot express."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_private import flatten_layers, own_variables
from kerasmp.backend.variable_dtypes import set_variable_dtype, takes_dtype
from kerasmp.policy.apply import apply
from kerasmp.policy.assign import assign
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kerasmp.policy.assign import Assignment
    from kerasmp.policy.layer_policies import LayerPolicies
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
        _build(model, inputs)
        present = [id(layer) for layer in flatten_layers(model)]
        if present == self._seen:
            return
        rows = assign(model, self._policy)
        apply(model, [row for row in rows if row.before == self._policy.name])
        self._seen = present  # now: rules that disagree are an error each time


class PoliciesToFollow:
    """The policies that the layers of one model had when it was saved; to be followed once.

    Args:
        policies: The policies.
        turn: Is called with the model and the policies first, to give layers the classes of then.
        variables_follow: Whether variables are to have the policies' dtypes, too. Their values come
            from the file later.
    """

    def __init__(
        self,
        policies: LayerPolicies,
        *,
        turn: Callable[[Any, LayerPolicies], object],
        variables_follow: bool = False,
    ) -> None:
        self.waiting: LayerPolicies | None = policies
        self._turn = turn
        self._variables_follow = variables_follow

    def follow(self, model: Any, *inputs: Any) -> None:
        """Give the layers their policies, if the model is built.

        Args:
            model: The model.
            *inputs: What it is about to be called with; builds the model where it is not built.
        """
        if self.waiting is None:
            return
        _build(model, inputs)
        # Keras says that it has built the model of a file only afterwards.
        if model.built or all(part.built for part in flatten_layers(model) if part is not model):
            self._turn(model, self.waiting)
            rows = self.waiting.assign(model)
            apply(model, rows, variables_follow=self._variables_follow)
            if self._variables_follow:
                _change_variables(rows)
            self.waiting = None


def _change_variables(rows: list[Assignment]) -> None:
    for row in rows:
        have, dtype = (
            keras.dtype_policies.get(name).variable_dtype for name in (row.before, row.after)
        )
        if {have, dtype} & set(HALVES):
            for variable in own_variables(row.layer):
                if takes_dtype(variable, dtype):
                    set_variable_dtype(variable, dtype)


def _build(model: Any, inputs: tuple[Any, ...]) -> None:
    """Build a model that is not, as layers make parts of their own then, attention its softmax."""
    if inputs and not model.built:
        # What cannot be traced is built by the call itself, as in Keras, and followed after it.
        with contextlib.suppress(Exception):
            keras.Model.__call__(model, *keras.tree.map_structure(_symbol, inputs))


def _symbol(value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return value
    return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))
