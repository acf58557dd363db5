"""What a conversion will do to a model, decided before anything changes."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import called_parts, has_call
from kerasmp.backend.keras_internals import flatten_layers, own_attributes
from kerasmp.backend.nested import optimizer_chain
from kerasmp.conversion.half_variables import plan_variables, rounding_said, with_variables
from kerasmp.conversion.report import ConvertedLayer
from kerasmp.conversion.trial import settle
from kerasmp.errors import LossScaleWarning, PolicyError, PolicyWarning
from kerasmp.layers.from_stock import counterparts, swap
from kerasmp.model.model import kerasmp_class
from kerasmp.model.optimizers import (
    find_optimizers,
    replaces_optimizer,
    trainable_float16_layers,
    unscaled_optimizers,
)
from kerasmp.policy import LayerPolicies, Policy
from kerasmp.policy.apply import set_layer_policy, take_back
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
    """What a conversion will do to a model.

    Args:
        model: The model.
        swaps: Each stock layer that becomes one of ours, with the class that it becomes.
        policies: Each layer whose policy changes, with the one that it is to follow.
        dtypes: What the symbolic tensors of the model's graphs are to say, by their `id`; empty if
            nothing of that changes.
        variables: Which variables change their dtype.
        for_inference: Whether the optimizer is let go, since variables are in half precision.
        output_dtype: What the model is to cast its outputs to; None leaves them.
        rows: One for the model and for each layer in it, as the report has them.
        layer_policies: The policies of all layers afterwards.
        notes: What else there is to say, a sentence each.
        warnings: What to warn of: text and class.
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
    """Decide all that a conversion does to a model, which is what it was when this returns.

    Rules go by classes, and whether a layer computes in half precision only a call tells. So layers
    have their new classes and policies while this looks, and get back what they had.

    Args:
        model: A built model.
        wanted: The policy with all its rules, or the policies of single layers.
        undo: An empty list, which has what takes that back meanwhile, in case of an interrupt.
        safe_layers: As for `convert`.
        variables: As for `convert`.
        sample: As for `convert`.

    Raises:
        PolicyError: For each reason that `convert` names.
    """
    notes: list[str] = []
    found = list(locations(model))
    late = _unbuilt(model)
    swaps: list[tuple[Any, type]] = []
    if safe_layers or isinstance(wanted, LayerPolicies):
        every = {id(layer) for layer, _ in found}
        meant = wanted.ours_in(model) if isinstance(wanted, LayerPolicies) else every
        swaps = counterparts(found, meant - late)
    replaced = {id(layer): type(layer).__name__ for layer, _ in swaps}
    if swaps:
        swap(model, swaps, undo)
    if isinstance(wanted, Policy):
        rows = assign(model, wanted, found)
        check_patterns(rows, wanted)
        notes += [f"no layer is a {x}, as a rule says" for x in unmatched_classes(rows, wanted)]
        output_dtype = wanted.output_dtype
    else:
        rows = wanted.assign(model)
        output_dtype = getattr(model, "_output_dtype", None)  # a text says nothing of it
    rows, unbuilt = _of_built_parts(model, rows, late)
    rows = with_variables(rows, variables)
    _refuse_quantising(rows)
    computed_in = {id(row.layer): row.layer.compute_dtype for row in rows}
    changes = [row for row in rows if row.before != row.after]
    for row in changes:
        undo.append(functools.partial(set_layer_policy, row.layer, row.layer.dtype_policy))
        set_layer_policy(row.layer, row.policy_after)
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
    of_optimizer, warnings = _of_optimizer(model, output_dtype, for_inference=for_inference)
    notes += [
        *unbuilt,
        *untried,
        *(text for row in rows for text in _kept_tensors(row, computed_in[id(row.layer)])),
        *_narrow_inputs(model),
        *of_optimizer,
        *([rounding_said(narrowed)] if narrowed else []),
    ]
    if narrowed and isinstance(model, keras.Model):
        notes.append(
            "variables in half precision: the model refuses to be trained"
            if for_inference
            else "variables are float32 again, less what rounding took: compile it to train it"
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


def _unbuilt(model: Any) -> set[int]:
    """Return the `id`s of the layers that only parts which are not built have, without a `call`."""
    parts = [part for part in called_parts(model) if part is not model]
    built = {id(x) for part in parts if part.built for x in flatten_layers(part)}
    return {id(x) for part in parts if not part.built for x in flatten_layers(part)} - built


def _of_built_parts(
    model: Any, rows: list[Assignment], late: set[int]
) -> tuple[list[Assignment], list[str]]:
    """Return the rows without those of a part that is not built, and what there is to say of it."""
    parts = {id(part) for part in called_parts(model)}
    notes = [
        f'"{row.path}" is not built and was left as it is: call it on a batch, and convert again'
        for row in rows
        if id(row.layer) in late & parts
    ]
    return [row for row in rows if id(row.layer) not in late], notes


def _refuse_quantising(rows: list[Assignment]) -> None:
    """Raise where a policy would quantise weights, or take quantised ones for others.

    Raises:
        PolicyError: There. Nothing could bring back what rounding takes.
    """
    for row in rows:
        have, want = (each.quantization_mode for each in (row.policy, row.policy_after))
        if have != want:
            raise PolicyError(
                "convert does not quantise: that rounds weights for good."
                if have is None
                else "The layer is quantised, and what that has rounded does not come back.",
                received=f'"{row.path}" under "{row.before}", and "{row.after}" for it',
                expected="a floating point policy"
                if have is None
                else f'a policy that keeps "{have}", or no rule for this layer',
                fix=f'Convert to "mixed_bfloat16", say, and call model.quantize("{want}") then.'
                if have is None
                else "Load or build the model anew to have it in another one.",
            )


def _will_be_half(model: Any, changes: Iterable[Change]) -> bool:
    """Return whether any variable of a model or layer will be float16 or bfloat16."""
    dtypes = {id(each): dtype for _, dtype, variables in changes for each in variables}
    return any(dtypes.get(id(each), each.dtype) in HALVES for each in model.variables)


def _kept_tensors(row: Assignment, compute_dtype: str) -> Iterator[str]:
    """Say which tensors in a layer's attributes will not follow, in words.

    Those of Keras's own Normalization do (`kerasmp.policy.apply`). What a user's layer keeps is
    theirs to make anew.

    Args:
        row: The layer, which follows its new policy now.
        compute_dtype: The dtype that it computed in before.
    """
    if row.layer.compute_dtype == compute_dtype:
        return
    for name, value in own_attributes(row.layer).items():
        if (
            hasattr(value, "dtype")  # to ask Keras takes long
            and keras.ops.is_tensor(value)
            and not isinstance(value, keras.Variable)
            and keras.backend.standardize_dtype(value.dtype) == compute_dtype
        ):
            yield (
                f'"{row.path}" made the tensor `{name}` in {compute_dtype} when it was built, and '
                "keeps it so: cast it where it is used"
            )


def _narrow_inputs(model: Any) -> list[str]:
    """Say which inputs round what they are given before any layer sees it, in words.

    Keras gives a Sequential without `Input` one of the dtype that its first layer computes in, and
    a conversion changes no input: a user may have chosen its dtype for the data.
    """
    return [
        f'the input "{layer.name}" is {layer.dtype} and rounds what it is given, whatever the '
        "layers compute in: build the model with keras.Input for another"
        for layer in flatten_layers(model)
        if isinstance(layer, keras.layers.InputLayer) and layer.dtype in HALVES
    ]


def _of_optimizer(
    model: Any, output_dtype: str | None, *, for_inference: bool
) -> tuple[list[str], list[tuple[str, type[Warning]]]]:
    """Return what there is to say, and to warn, of the optimizer that a model will have.

    Args:
        model: The model, whose class and layers are what they will be.
        output_dtype: What it is to cast its outputs to.
        for_inference: Whether the optimizer is let go.
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
        said = f"the optimizer {name} is let go with its state: the model is for inference"
        return ([] if optimizer is None else [said]), warnings
    wrapped = []
    if replaces_optimizer(model):
        wrapped = optimizer_chain(optimizer)
        notes.append(
            f"the optimizer {name} is inside kerasmp.LossScaleOptimizer now, its state is kept"
            if inner is optimizer
            else f"stock Keras's LossScaleOptimizer around {name} is ours now, its state is kept"
        )
    own = find_optimizers(model)
    plain = [
        each for each in unscaled_optimizers(model) if not any(own[each] is x for x in wrapped)
    ]
    if plain and trainable_float16_layers(model):
        names = ", ".join(plain)
        notes.append(
            f"nothing scales the loss of {names}, which float16 needs: wrap in "
            "kerasmp.LossScaleOptimizer"
        )
        text = (
            f'Layers of the model "{model.name}" compute in float16, and nothing scales the loss '
            f"of its optimizers ({names}). Wrap each in kerasmp.LossScaleOptimizer, and compile "
            "again."
        )
        warnings.append((text, LossScaleWarning))
    return notes, warnings
