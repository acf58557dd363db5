"""A built or loaded model into another policy, and back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import called_parts, has_call
from kerasmp.backend.keras_private import flatten_layers, layers_in, losses_kept
from kerasmp.conversion.compiled import (
    compiled_steps,
    forget_compiled_steps,
    put_compiled_steps_back,
    turn_to_ours,
)
from kerasmp.conversion.costs import Cost, measure
from kerasmp.conversion.inference import (
    any_half,
    change_variables,
    check_asked,
    let_train_or_refuse,
    over_float32,
    stop_training,
    with_variables,
)
from kerasmp.conversion.kept import kept_tensors, narrow_inputs
from kerasmp.conversion.order import begin
from kerasmp.conversion.report import ConversionReport, ConvertedLayer
from kerasmp.conversion.trial import settle
from kerasmp.errors import (
    ArgumentError,
    ArgumentTypeError,
    KerasMPError,
    PolicyError,
    first_line,
    refuse_no_bool,
)
from kerasmp.layers.from_stock import turn_to_safe
from kerasmp.policy import Policy
from kerasmp.policy.apply import let_follow, put_back
from kerasmp.policy.assign import Assignment, assign
from kerasmp.policy.follow import build_by
from kerasmp.policy.layer_policies import LayerPolicies
from kerasmp.policy.matching import refuse_unmatched, unmatched_classes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kerasmp.policy.policy import PolicyLike, RulesLike


def convert(  # noqa: PLR0913 - all but two have to be named
    model: Any,
    policy: PolicyLike | LayerPolicies = "mixed_float16",
    *,
    rules: RulesLike = "safe",
    safe_layers: bool = False,
    variables: str | None = None,
    sample: Any = None,
    dry_run: bool = False,
) -> ConversionReport:
    """Let a built or loaded model compute under another policy, in place.

    Weights are kept as they are, to the last bit. Symbolic tensors such as `model.outputs` say the
    new dtypes, and steps that are compiled already are compiled anew. The model becomes one of ours
    as by `Model.from_keras`, so that its loss is scaled, a bad step leaves no trace, and its files
    keep the policy of each layer; of a compiled model the optimizer is wrapped, its state kept.
    Another model that shares layers with this one sees them in the new dtypes, but keeps steps that
    it has compiled. Layers that cannot compute in half precision stay in float32, and the report
    says why. If anything fails, the model is what it was; one that `sample` has built stays built.

    Args:
        model: A Keras model, stock or ours, of any kind, that has been built. One without a `call`,
            such as a GAN, is converted by its parts, those that are built.
        policy: A policy, or anything that `Policy` accepts, default "mixed_float16"; or the
            `LayerPolicies` of an earlier conversion, also of another build of the same model.
        rules: Rules as for `Policy`, beside those of `policy`; default "safe". None adds none.
        safe_layers: Also turn stock layers into those of `kerasmp.layers` where there are such, in
            place, with their weights, so that more of the model can stay in half precision. Of
            `LayerPolicies` the text says which.
        variables: "float16" or "bfloat16" for inference alone: layers that compute in it keep their
            variables in it too, in half the bytes, and the model refuses to be trained. "float32"
            undoes that, less the rounding, as does any policy over float32 variables. None, the
            default, narrows none.
        sample: A batch of inputs. The converted model is called on it once, eagerly, and the report
            says what each layer does: multiply-adds, bytes of activations and of casts. Without
            it these are unknown. A model that is not built is built by it first, before anything is
            checked and in a dry run, too, and stays built.
        dry_run: Only say what would be done.

    Returns:
        A report with one row for each layer, which prints as a table, and `restore()`.

    Raises:
        PolicyError: If the policy does not exist, two rules disagree, a pattern matches no layer,
            the model is not built, weights would have to change to a dtype that was not asked for,
            a weight would become inf in it, a policy would quantise a layer, or a rule wants a
            layer in half precision that cannot compute in it.
        ArgumentTypeError: If `model` is no Keras model, or a switch no bool.
        ArgumentError: If the model cannot be called on `sample`.

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
    refuse_no_bool("safe_layers", safe_layers)
    refuse_no_bool("dry_run", dry_run)
    check_asked(variables)
    _refuse_beside_text(policy, rules, safe_layers=safe_layers)
    wanted: Policy | LayerPolicies = (
        policy
        if isinstance(policy, LayerPolicies)
        else _with_rules(over_float32(Policy(policy), variables), rules)
    )
    _build(model, sample)
    steps = compiled_steps(model)
    undo = contextlib.ExitStack()
    undo.callback(forget_compiled_steps, model)
    try:
        replaced = _turn_layers(model, wanted, undo, all_of_them=safe_layers)
        rows, notes = _convert(model, wanted, variables, sample, undo)
        with _calls_on_sample(model):
            costs = measure(model, sample) if has_call(model) and sample is not None else {}
        if not has_call(model) and sample is not None:
            notes.append("the sample was not used: the model has no call")
        policy = wanted if isinstance(wanted, Policy) else None
        to = "the policies of a text" if policy is None else f'"{policy}"'
        layers = [row.layer for row in rows]
        report = ConversionReport(
            model=model,
            policy=policy,
            rows=[_converted(row, replaced, costs) for row in rows],
            layer_policies=LayerPolicies.of(model),
            notes=notes,
            undo=undo,
            conversion=None if dry_run else begin(model, layers, to, undo),
        )
    except BaseException:  # an interrupt, too
        undo.close()
        put_compiled_steps_back(steps)
        raise
    if dry_run:
        report.restore()
        put_compiled_steps_back(steps)
    return report


def _convert(
    model: Any,
    wanted: Policy | LayerPolicies,
    variables: str | None,
    sample: Any,
    undo: contextlib.ExitStack,
) -> tuple[list[Assignment], list[str]]:
    notes: list[str] = []
    if isinstance(wanted, Policy):
        rows = assign(model, wanted)
        refuse_unmatched(rows, wanted)
        notes += [
            f"no layer is a {name}, as a rule says" for name in unmatched_classes(rows, wanted)
        ]
    else:
        rows = wanted.assign(model)
    rows = with_variables(_of_built_parts(model, rows, notes), variables)
    _refuse_quantising(rows)
    before = {id(row.layer): row.layer.compute_dtype for row in rows}
    changes = [row for row in rows if row.before != row.after]
    undo.callback(put_back, model, [(row.layer, row.layer.dtype_policy) for row in changes])
    for row in changes:
        let_follow(row.layer, row.policy_after)
    rows, untried = settle(model, rows, sample)
    notes += untried
    changed = change_variables(rows, undo)
    notes += [text for row in rows for text in kept_tensors(row, before[id(row.layer)])]
    notes += narrow_inputs(model)
    half = any_half(model) and bool(changed or getattr(model, "_for_inference", False))
    notes += stop_training(model, undo) if half else []
    # A text says nothing of it.
    known = getattr(model, "_output_dtype", None)
    output_dtype = wanted.output_dtype if isinstance(wanted, Policy) else known
    notes += turn_to_ours(model, output_dtype, undo, trains=not half)
    notes += let_train_or_refuse(model, changed, undo)
    forget_compiled_steps(model)
    return rows, notes


def _refuse_beside_text(policy: object, rules: object, *, safe_layers: bool) -> None:
    if isinstance(policy, LayerPolicies) and (safe_layers or rules not in ("safe", None)):
        raise PolicyError(
            "LayerPolicies say all of each layer, and leave nothing to rules.",
            received=f"LayerPolicies with rules={rules!r}, safe_layers={safe_layers}",
            expected="LayerPolicies alone",
            fix="Change the text, or convert by a policy with rules.",
        )


def _turn_layers(
    model: Any,
    wanted: Policy | LayerPolicies,
    undo: contextlib.ExitStack,
    *,
    all_of_them: bool,
) -> dict[int, str]:
    if not isinstance(wanted, LayerPolicies) and not all_of_them:
        return {}
    late = _unbuilt(model)
    every = {id(layer) for layer in flatten_layers(model)}
    meant = wanted.ours_in(model) if isinstance(wanted, LayerPolicies) else every
    return turn_to_safe(model, undo, only={key for key in every - late if key in meant})


def _check(model: Any) -> None:
    if not isinstance(model, keras.Layer):
        raise ArgumentTypeError(
            "Only a Keras model can be converted.",
            received=f"{model!r}, a {type(model).__name__}",
            expected="a keras.Model",
            fix="Pass the model, and the policy after it.",
        )


def _build(model: Any, sample: Any) -> None:
    """Build a model that is not, by a sample, and raise without one.

    Raises:
        PolicyError: If there is none, or no part of a model without a `call` is built.
    """
    parts = called_parts(model)
    if has_call(model) and not model.built and sample is not None:
        build_by(model, sample)
        if not model.built:
            with _calls_on_sample(model), losses_kept(model):
                model(sample, training=False)
    if not any(part.built for part in parts):
        raise PolicyError(
            "The model is not built, and parts that come later would not follow.",
            received=f'the model "{model.name}"'
            + ("" if has_call(model) else ", which has no call, and none of its parts is built"),
            expected="a built model",
            fix="Give a batch of inputs as sample=, or call the model on one first, or build it "
            "under kerasmp.policy_scope(policy)."
            if has_call(model)
            else "Call its parts on a batch first.",
        )


@contextlib.contextmanager
def _calls_on_sample(model: Any) -> Iterator[None]:
    """Raise for whatever a call of a model on a sample raises.

    Raises:
        ArgumentError: Then.
    """
    try:
        yield
    except KerasMPError:
        raise
    except Exception as error:
        where = [layer.path or layer.name for layer in layers_in(error)]
        raise ArgumentError(
            "The model cannot be called on `sample`.",
            received=f'"{where[0] if where else model.name}", which raised {first_line(error)}',
            expected="a batch as model.predict_on_batch takes it",
            fix="Pass one, or leave `sample` out.",
        ) from error


def _of_built_parts(model: Any, rows: list[Assignment], notes: list[str]) -> list[Assignment]:
    """Return the rows without those of a part that is not built, in a model without a `call`."""
    late = _unbuilt(model)
    parts = {id(part) for part in called_parts(model)}
    notes += [
        f'"{row.path}" is not built and was left as it is: call it on a batch, and convert again'
        for row in rows
        if id(row.layer) in late & parts
    ]
    return [row for row in rows if id(row.layer) not in late]


def _unbuilt(model: Any) -> set[int]:
    """Return the `id`s of the layers that only parts which are not built have, without a `call`."""
    parts = [part for part in called_parts(model) if part is not model]
    built = {id(x) for part in parts if part.built for x in flatten_layers(part)}
    return {id(x) for part in parts if not part.built for x in flatten_layers(part)} - built


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


def _with_rules(policy: Policy, rules: RulesLike) -> Policy:
    return Policy(policy, rules=[rules, policy.rules, "safe" if policy.safe else None])


def _converted(row: Assignment, replaced: dict[int, str], costs: dict[int, Cost]) -> ConvertedLayer:
    return ConvertedLayer(
        layer=row.layer,
        path=row.path,
        class_name=type(row.layer).__name__,
        before=row.before,
        after=row.after,
        reason=row.reason,
        replaced=replaced.get(id(row.layer)),
        cost=costs.get(id(row.layer)),
    )
