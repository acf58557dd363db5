"""A built or loaded model into another policy, and back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.conversion.compiled import (
    compiled_steps,
    forget_compiled_steps,
    put_compiled_steps_back,
    turn_to_ours,
)
from kerasmp.conversion.kept import kept_tensors
from kerasmp.conversion.report import ConversionReport, ConvertedLayer
from kerasmp.errors import ArgumentTypeError, PolicyError
from kerasmp.policy import Policy
from kerasmp.policy.apply import apply, put_back
from kerasmp.policy.assign import Assignment, assign
from kerasmp.policy.layer_policies import LayerPolicies
from kerasmp.policy.matching import refuse_unmatched, unmatched_classes

if TYPE_CHECKING:
    from kerasmp.policy.policy import PolicyLike, RulesLike


def convert(
    model: Any,
    policy: PolicyLike | LayerPolicies = "mixed_float16",
    *,
    rules: RulesLike = "safe",
    dry_run: bool = False,
) -> ConversionReport:
    """Let a built or loaded model compute under another policy, in place.

    Weights are kept as they are, to the last bit. Symbolic tensors such as `model.outputs` say the
    new dtypes, and steps that are compiled already are compiled anew. The model becomes one of ours
    as by `Model.from_keras`, so that its loss is scaled, a bad step leaves no trace, and its files
    keep the policy of each layer; of a compiled model the optimizer is wrapped, its state kept.
    Another model that shares layers with this one sees them in the new dtypes, but keeps steps that
    it has compiled. If anything fails, the model is what it was.

    Args:
        model: A Keras model, stock or ours, of any kind, that has been built.
        policy: A policy, or anything that `Policy` accepts, default "mixed_float16"; or the
            `LayerPolicies` of an earlier conversion, also of another build of the same model.
        rules: Rules as for `Policy`, beside those of `policy`; default "safe". None adds none.
        dry_run: Only say what would be done.

    Returns:
        A report with one row for each layer, which prints as a table, and `restore()`.

    Raises:
        PolicyError: If the policy does not exist, two rules disagree, a pattern matches no layer,
            the model is not built, or weights would have to change their dtype.
        ArgumentTypeError: If `model` is no Keras model.

    Warns:
        LossScaleWarning: If layers train in float16 and the model keeps optimizers in attributes
            that scale no loss.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    >>> report = convert(model, "mixed_float16")
    >>> [layer.compute_dtype for layer in model.layers]
    ['float16', 'float32']
    >>> report.restore()
    >>> [layer.compute_dtype for layer in model.layers]
    ['float32', 'float32']
    """
    _check(model)
    wanted = policy if isinstance(policy, LayerPolicies) else _with_rules(policy, rules)
    undo = contextlib.ExitStack()
    if dry_run:
        undo.callback(put_compiled_steps_back, compiled_steps(model))
    try:
        report = _convert(model, wanted, undo)
    except BaseException:  # an interrupt, too
        undo.close()
        raise
    if dry_run:
        report.restore()
    return report


def _convert(
    model: Any, wanted: Policy | LayerPolicies, undo: contextlib.ExitStack
) -> ConversionReport:
    undo.callback(forget_compiled_steps, model)
    notes: list[str] = []
    if isinstance(wanted, Policy):
        rows = assign(model, wanted)
        refuse_unmatched(rows, wanted)
        notes += [
            f"no layer is a {name}, as a rule says" for name in unmatched_classes(rows, wanted)
        ]
    else:
        rows = wanted.assign(model)
    before = {id(row.layer): row.layer.compute_dtype for row in rows}
    undo.callback(put_back, model, apply(model, rows))
    notes += [text for row in rows for text in kept_tensors(row, before[id(row.layer)])]
    output_dtype = wanted.output_dtype if isinstance(wanted, Policy) else None
    notes += turn_to_ours(model, output_dtype, undo)
    forget_compiled_steps(model)
    return ConversionReport(
        model=model,
        policy=wanted if isinstance(wanted, Policy) else None,
        rows=[_converted(row) for row in rows],
        layer_policies=LayerPolicies.of(model),
        notes=notes,
        undo=undo,
    )


def _check(model: Any) -> None:
    if not isinstance(model, keras.Layer):
        raise ArgumentTypeError(
            "Only a Keras model can be converted.",
            received=f"{model!r}, a {type(model).__name__}",
            expected="a keras.Model",
            fix="Pass the model, and the policy after it.",
        )
    if not model.built:
        raise PolicyError(
            "The model is not built, and parts that come later would not follow.",
            received=f'the model "{model.name}"',
            expected="a built model",
            fix="Call it on a batch first, or build it under kerasmp.policy_scope(policy).",
        )


def _with_rules(policy: PolicyLike, rules: RulesLike) -> Policy:
    own = Policy(policy)
    return Policy(own, rules=[rules, own.rules, "safe" if own.safe else None])


def _converted(row: Assignment) -> ConvertedLayer:
    return ConvertedLayer(
        layer=row.layer,
        path=row.path,
        class_name=type(row.layer).__name__,
        before=row.before,
        after=row.after,
        reason=row.reason,
    )
