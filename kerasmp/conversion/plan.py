"""Plans what a conversion does to a model, before anything changes."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import called_parts, has_call
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.backend.nested import optimizer_chain
from kerasmp.backend.side_effects import own_attributes
from kerasmp.conversion.half_variables import plan_variables, summary, with_variables
from kerasmp.conversion.report import ConvertedLayer
from kerasmp.conversion.trial import settle
from kerasmp.errors import LossScaleWarning, PolicyError, PolicyWarning
from kerasmp.layers.from_stock import apply_swaps, plan_swaps
from kerasmp.model.model import kerasmp_class
from kerasmp.model.optimizers import (
    find_optimizers,
    replaces_optimizer,
    trainable_float16_layers,
    unscaled_optimizers,
)
from kerasmp.policy import LayerPolicies, Policy
from kerasmp.policy.apply import set_policies, take_back
from kerasmp.policy.assign import assign, check_patterns, unmatched_classes
from kerasmp.policy.layer_policies import policies_at
from kerasmp.policy.locations import locations
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kerasmp.conversion.half_variables import Change
    from kerasmp.policy.apply import Undo
    from kerasmp.policy.assign import Assignment


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a conversion does to a model.

    Args:
        model: The model.
        swaps: Each stock layer that becomes a kerasmp layer, with its new class.
        policies: Each layer whose policy changes, with its new policy.
        dtypes: The new dtypes of the symbolic tensors in the model's graphs, by `id`; empty if none
            changes.
        variables: The variables whose dtype changes.
        for_inference: Whether the optimizer is removed, since variables are in half precision.
        output_dtype: The dtype that the model casts its outputs to; None does not cast.
        rows: The rows of the report, one for the model and for each layer in it.
        layer_policies: The policies of all layers afterwards.
        notes: The notes of the report, a sentence each.
        warnings: The warnings to give: text and class.
    """

    model: Any
    swaps: tuple[tuple[Any, type], ...]
    policies: tuple[tuple[Any, keras.DTypePolicy], ...]
    dtypes: dict[int, str]
    variables: tuple[Change, ...]
    for_inference: bool
    output_dtype: str | None
    rows: tuple[ConvertedLayer, ...]
    layer_policies: LayerPolicies
    notes: tuple[str, ...]
    warnings: tuple[tuple[str, type[Warning]], ...]


def make_plan(  # noqa: PLR0913 - what `convert` was given
    model: Any,
    wanted: Policy | LayerPolicies,
    undo: Undo,
    *,
    safe_layers: bool,
    variables: str | None,
    sample: Any,
) -> Plan:
    """Decide everything that a conversion does to a model. The model does not change.

    Rules go by classes, and only a call shows whether a layer computes in half precision. So layers
    have their new classes and policies while this runs, and get their old ones back.

    Args:
        model: A built model.
        wanted: The policy with all its rules, or the policies of single layers.
        undo: An empty list, which meanwhile has the functions that undo this, for an interrupt.
        safe_layers: As for `convert`.
        variables: As for `convert`.
        sample: As for `convert`.

    Raises:
        PolicyError: For each reason that `convert` names.
    """
    notes: list[str] = []
    found = list(locations(model))
    unbuilt = _unbuilt_layers(model)
    swaps: list[tuple[Any, type]] = []
    if safe_layers or isinstance(wanted, LayerPolicies):
        candidates = (
            wanted.ours_in(model)
            if isinstance(wanted, LayerPolicies)
            else {id(layer) for layer, _ in found}
        )
        swaps = plan_swaps(found, candidates - unbuilt)
    replaced = {id(layer): type(layer).__name__ for layer, _ in swaps}
    if swaps:
        apply_swaps(model, swaps, undo)
    if isinstance(wanted, Policy):
        rows = assign(model, wanted, found)
        check_patterns(rows, wanted)
        notes += [f"no layer is a {x}, which a rule names" for x in unmatched_classes(rows, wanted)]
        output_dtype = wanted.output_dtype
    else:
        rows = wanted.assign(model)
        output_dtype = getattr(model, "_output_dtype", None)  # a text does not contain it
    parts = {id(part) for part in called_parts(model)}
    notes += [
        f'"{row.path}" is not built and was not converted: call it on a batch, and convert again'
        for row in rows
        if id(row.layer) in unbuilt & parts
    ]
    rows = with_variables([row for row in rows if id(row.layer) not in unbuilt], variables)
    _refuse_quantizing(rows)
    computed_in = {id(row.layer): row.layer.compute_dtype for row in rows}
    changes = [row for row in rows if row.before != row.after]
    set_policies(((row.layer, row.policy_after) for row in changes), undo)
    untried: list[str] = []
    dtypes: dict[int, str] = {}
    if swaps or changes:
        rows, untried, dtypes = settle(model, rows, sample)
    narrowed, variable_changes = plan_variables(rows)
    if isinstance(model, keras.Model):
        undo.append(functools.partial(object.__setattr__, model, "__class__", type(model)))
        object.__setattr__(model, "__class__", kerasmp_class(model))
    for_inference = bool(narrowed or getattr(model, "_for_inference", False)) and _will_be_half(
        model, variable_changes
    )
    optimizer_notes, warnings = _about_optimizer(model, output_dtype, for_inference=for_inference)
    notes += [
        *untried,
        *(text for row in rows for text in _stale_tensors(row, computed_in[id(row.layer)])),
        *_narrow_inputs(model),
        *optimizer_notes,
        *([summary(narrowed)] if narrowed else []),
    ]
    if narrowed and isinstance(model, keras.Model):
        notes.append(
            "variables in half precision: the model refuses to be trained"
            if for_inference
            else "variables are float32 again, with rounded values: compile the model to train it"
        )
    if sample is not None and not has_call(model):
        notes.append("the sample was not used: the model has no call")
    plan = Plan(
        model=model,
        swaps=tuple(swaps),
        policies=tuple((row.layer, row.policy_after) for row in rows if row.before != row.after),
        dtypes=dtypes,
        variables=tuple(variable_changes),
        for_inference=for_inference,
        output_dtype=output_dtype,
        rows=tuple(
            ConvertedLayer(
                layer=row.layer,
                path=row.path,
                class_name=type(row.layer).__name__,
                before=row.before,
                after=row.after,
                reason=row.reason,
                replaced=replaced.get(id(row.layer)),
            )
            for row in rows
        ),
        layer_policies=policies_at(found),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
    take_back(undo)
    return plan


def _unbuilt_layers(model: Any) -> set[int]:
    """Return the `id`s of the layers that are in unbuilt parts of a model without a `call` only."""
    parts = [part for part in called_parts(model) if part is not model]
    built = {id(x) for part in parts if part.built for x in flatten_layers(part)}
    return {id(x) for part in parts if not part.built for x in flatten_layers(part)} - built


def _refuse_quantizing(rows: list[Assignment]) -> None:
    """Raise if a policy would quantize weights, or use quantized weights as if they were floats.

    Raises:
        PolicyError: If so. Nothing could bring back what rounding loses.
    """
    for row in rows:
        have, want = (each.quantization_mode for each in (row.policy, row.policy_after))
        if have != want:
            raise PolicyError(
                "convert does not quantize, because that rounds weights for good."
                if have is None
                else "The layer is quantized, and its float weights cannot be brought back.",
                received=f'"{row.path}" under "{row.before}", and "{row.after}" for it',
                expected="a floating point policy"
                if have is None
                else f'a policy that keeps "{have}", or no rule for this layer',
                fix=f'Convert to "mixed_bfloat16", for example, then call model.quantize("{want}").'
                if have is None
                else "Load or build the model again to use another policy.",
            )


def _will_be_half(model: Any, changes: Iterable[Change]) -> bool:
    """Return whether any variable of a model will be float16 or bfloat16."""
    dtypes = {id(each): dtype for _, dtype, variables in changes for each in variables}
    return any(dtypes.get(id(each), each.dtype) in HALVES for each in model.variables)


def _stale_tensors(row: Assignment, compute_dtype: str) -> Iterator[str]:
    """Yield a note for each tensor in a layer's attributes that stays in the old compute dtype.

    Those of Keras's Normalization are renewed (`kerasmp.policy.apply`). Only its author can renew
    those of a user's layer.

    Args:
        row: The layer, which follows its new policy now.
        compute_dtype: The dtype that it computed in before.
    """
    if row.layer.compute_dtype == compute_dtype:
        return
    for name, value in own_attributes(row.layer).items():
        if (
            hasattr(value, "dtype")  # asking Keras is slow
            and keras.ops.is_tensor(value)
            and not isinstance(value, keras.Variable)
            and keras.backend.standardize_dtype(value.dtype) == compute_dtype
        ):
            yield (
                f'"{row.path}" created the tensor `{name}` in {compute_dtype} when it was built, '
                "and does not create it again: cast it where it is used"
            )


def _narrow_inputs(model: Any) -> list[str]:
    """Return a note for each input that rounds the data before any layer sees it.

    Keras gives a Sequential without `Input` an input in the compute dtype of its first layer. A
    conversion changes no input, since a user may have chosen its dtype for the data.
    """
    return [
        f'the input "{layer.name}" is {layer.dtype} and rounds the data, whatever the layers '
        "compute in: to change that, build the model with keras.Input"
        for layer in flatten_layers(model)
        if isinstance(layer, keras.layers.InputLayer) and layer.dtype in HALVES
    ]


def _about_optimizer(
    model: Any, output_dtype: str | None, *, for_inference: bool
) -> tuple[list[str], list[tuple[str, type[Warning]]]]:
    """Return the notes and the warnings about the optimizer that a model will have.

    Args:
        model: The model, which has its new class and its new layers.
        output_dtype: The dtype that it casts its outputs to.
        for_inference: Whether the optimizer is removed.
    """
    notes: list[str] = []
    warnings: list[tuple[str, type[Warning]]] = []
    optimizer = getattr(model, "optimizer", None)  # a model that is not compiled may lack it
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    name = type(inner).__name__
    if not isinstance(model, keras.Model):
        if output_dtype is not None:
            text = f"The layer will not follow output={output_dtype}: only models do."
            warnings.append((text, PolicyWarning))
        return notes, warnings
    if for_inference:
        note = f"the optimizer {name} is removed with its state: the model is for inference only"
        return ([] if optimizer is None else [note]), warnings
    wrapped = []
    if replaces_optimizer(model):
        wrapped = optimizer_chain(optimizer)
        notes.append(
            f"the optimizer {name} is wrapped in kerasmp.LossScaleOptimizer, with its state"
            if inner is optimizer
            else f"kerasmp's LossScaleOptimizer replaces Keras's around {name}, with its state"
        )
    optimizers = find_optimizers(model)
    unscaled = [
        attribute
        for attribute in unscaled_optimizers(model)
        if not any(optimizers[attribute] is each for each in wrapped)
    ]
    if unscaled and trainable_float16_layers(model):
        names = ", ".join(unscaled)
        notes.append(
            f"nothing scales the loss of {names}, which float16 needs: wrap each in "
            "kerasmp.LossScaleOptimizer"
        )
        text = (
            f'Layers of the model "{model.name}" compute in float16, and nothing scales the loss '
            f"of its optimizers ({names}). Wrap each in kerasmp.LossScaleOptimizer, and compile "
            "again."
        )
        warnings.append((text, LossScaleWarning))
    return notes, warnings
