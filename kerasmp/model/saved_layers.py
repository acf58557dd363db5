"""The policies and dtypes of a model's layers, as its files contain them and as loading applies."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import (
    policy_of,
    refresh_symbolic_dtypes,
    set_input_dtype,
    set_policy,
)
from kerasmp.backend.keras_internals import flatten_layers, own_variables
from kerasmp.backend.variable_dtypes import set_variable_dtype, takes_dtype
from kerasmp.errors import PolicyError, PolicyWarning
from kerasmp.layers.from_stock import swap_stock_layers
from kerasmp.policy.apply import apply
from kerasmp.policy.follow import build_with
from kerasmp.policy.layer_policies import LayerPolicies, read
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kerasmp.policy.assign import Assignment

# The keys that `layer_extras` may return.
_KEYS = (
    "layer_policies",
    "input_policies",
    "input_dtypes",
    "variable_dtypes",
    "built",
    "layers_may_differ",
)


def layer_extras(model: Any) -> dict[str, Any]:
    """Return what the files of a model contain about its layers beside Keras's config.

    Args:
        model: A kerasmp model.
    """
    policies = LayerPolicies.of(model)
    extras: dict[str, Any] = {
        "layer_policies": str(policies),
        "input_policies": [policy_of(layer).name for layer in _inputs(model)],
        "input_dtypes": [layer.dtype for layer in _inputs(model)],
        "variable_dtypes": {
            str(number): dtypes
            for number, row in enumerate(policies.assign(model))
            if (dtypes := [v.dtype for v in own_variables(row.layer)])
            and set(dtypes) != {policy_of(row.layer).variable_dtype}
        },
    }
    if not model.built:
        extras["built"] = False
    if not model._saves_layer_policies:  # noqa: SLF001 - its own package
        extras["layers_may_differ"] = True  # such files always loaded, so a difference only warns
    return extras


class SavedLayers:
    """The policies and variable dtypes that a file contains, to be applied to the model once.

    Args:
        extras: What `layer_extras` returned, with or without other keys.
    """

    def __init__(self, extras: Mapping[str, Any]) -> None:
        self.pending = {name: extras[name] for name in _KEYS if name in extras}

    def follow(self, model: Any, *inputs: Any) -> None:
        """Apply them if the model is built and they have not been applied yet.

        Args:
            model: The model.
            *inputs: The inputs of the call that begins, which builds a model that is not built.
        """
        if not self.pending:
            return
        build_with(model, *inputs)
        # While Keras builds a loaded model, the model itself is the last to count as built.
        if model.built or all(part.built for part in flatten_layers(model) if part is not model):
            self.apply(model)

    def apply(self, model: Any) -> None:
        """Give the layers of a model the policies and dtypes that they were saved with.

        Raises:
            PolicyError: If its layers differ from those of the file, and it was converted.

        Warns:
            PolicyWarning: If they differ, and it was not converted.
        """
        text = self.pending["layer_policies"]
        try:
            rows = _assign(model, read(text, allow_unknown=True))
        except PolicyError as error:
            if not self.pending.get("layers_may_differ"):
                raise
            _warn_of_other_layers(model, text, error)
        else:
            # Older files have no dtypes; there, variables follow in inference-only models.
            dtypes = self.pending.get("variable_dtypes")
            variables_follow = dtypes is not None or model._for_inference  # noqa: SLF001
            before = [policy_of(row.layer).variable_dtype for row in rows]
            apply(model, rows, variables_follow=variables_follow)
            _restore_input_dtypes(model, self.pending.get("input_dtypes", ()))
            if variables_follow:
                _restore_variable_dtypes(rows, before, dtypes)
            policies = self.pending.get("input_policies", ())
            for layer, policy in zip(_inputs(model), policies, strict=False):
                with contextlib.suppress(TypeError, ValueError):  # user-defined, and without effect
                    set_policy(layer, keras.dtype_policies.get(policy))
            if model._for_inference:  # noqa: SLF001
                for part in flatten_layers(model):
                    if is_kerasmp_model(part) and part is not model:  # refuse as after conversion
                        part._for_inference = any(v.dtype in HALVES for v in part.variables)  # noqa: SLF001
        self.pending = {}


def is_kerasmp_model(layer: Any) -> bool:
    """Return whether a layer is a kerasmp model, whose module imports this one."""
    return hasattr(layer, "_saves_layer_policies")


def _assign(model: Any, policies: LayerPolicies) -> list[Assignment]:
    """Return the assignments, after layers that were kerasmp's have become so again.

    The model's class may have created stock layers in their place.
    """
    replaced = policies.ours_in(model)
    swap_stock_layers(model, [], only=replaced)
    for part in flatten_layers(model):
        if id(part) in replaced and isinstance(part, keras.Model):
            type(model).from_keras(part)
    return policies.assign(model, allow_new_names=True)


def _warn_of_other_layers(model: Any, text: str, error: PolicyError) -> None:
    """Warn that the layers of a model are not those of its file, unless all policies are equal."""
    saved = {line.rpartition(": ")[2] for line in text.splitlines()}
    if len(saved | {row.policy for row in LayerPolicies.of(model)}) > 1:
        warnings.warn(
            f'The layer policies of "{model.name}" cannot be restored, because its class creates '
            f"other layers than the file describes. Received: {error.received}. Expected: "
            f"{error.expected}. The layers keep the policies from the constructor. Create all "
            "layers in the constructor or in `build`, or load the file under the policy that the "
            "model was made under, with kerasmp.policy_scope(policy).",
            PolicyWarning,
            stacklevel=2,
        )


def _inputs(model: Any) -> list[Any]:
    """Return the input layers, which `LayerPolicies` leave out: they have the dtype of the data."""
    return [x for x in flatten_layers(model) if isinstance(x, keras.layers.InputLayer)]


def _restore_input_dtypes(model: Any, dtypes: Iterable[str]) -> None:
    """Give inputs the dtypes of the file: without `Input`, a Sequential takes its layers'.

    Args:
        model: The model.
        dtypes: One for each input; none in an older file.
    """
    pairs = zip(_inputs(model), dtypes, strict=False)
    changed = [(layer, dtype) for layer, dtype in pairs if layer.dtype != dtype]
    for layer, dtype in changed:
        set_input_dtype(layer, dtype)
    if changed:
        refresh_symbolic_dtypes(model)


def _restore_variable_dtypes(
    rows: Iterable[Assignment], before: Iterable[str], saved: Mapping[str, list[str]] | None
) -> None:
    """Give variables the dtypes of the file, which has their values too and loads them later.

    Args:
        rows: The assignments.
        before: The variable dtype of each layer's policy before.
        saved: The dtypes that differ from the policy, by row; None in an older file.
    """
    for number, (row, have) in enumerate(zip(rows, before, strict=True)):
        want = policy_of(row.layer).variable_dtype
        if saved is None and not {have, want} & set(HALVES):
            continue
        variables = own_variables(row.layer)
        dtypes = (saved or {}).get(str(number), [want] * len(variables))
        for variable, dtype in zip(variables, dtypes, strict=False):
            if takes_dtype(variable, dtype):
                set_variable_dtype(variable, dtype)
