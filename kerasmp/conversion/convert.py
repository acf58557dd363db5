"""A built or loaded model into another policy, and back: carries out a plan, step by step."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import called_parts, has_call, refresh_symbolic_dtypes
from kerasmp.backend.keras_internals import flatten_layers, layers_in, losses_kept
from kerasmp.backend.variable_dtypes import set_variable_dtype
from kerasmp.conversion.costs import measure
from kerasmp.conversion.half_variables import check_asked, loadable_initializers, over_float32
from kerasmp.conversion.order import begin
from kerasmp.conversion.plan import make_plan
from kerasmp.conversion.report import ConversionReport
from kerasmp.errors import (
    ArgumentError,
    ArgumentTypeError,
    KerasMPError,
    PolicyError,
    check_bool,
    first_line,
)
from kerasmp.layers.from_stock import swap
from kerasmp.model import Model
from kerasmp.model.float32 import layers_to_widen, widen_activity_regularizers
from kerasmp.model.guards import remove_guards
from kerasmp.model.optimizers import adopt_optimizer
from kerasmp.optimizer.scaled_losses import unnote_successor
from kerasmp.policy import LayerPolicies, Policy
from kerasmp.policy.apply import set_layer_policy, take_back
from kerasmp.policy.follow import build_with
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kerasmp.conversion.half_variables import Change
    from kerasmp.conversion.plan import Plan
    from kerasmp.policy.apply import Undo
    from kerasmp.policy.policy import PolicyLike, RulesLike

# The compiled steps that Keras keeps: they would go on in the dtypes of before.
_COMPILED = ("train_function", "test_function", "predict_function")
_MISSING = object()


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
    check_bool("safe_layers", safe_layers)
    check_bool("dry_run", dry_run)
    check_asked(variables)
    _refuse_beside_text(policy, rules, safe_layers=safe_layers)
    wanted: Policy | LayerPolicies = (
        policy
        if isinstance(policy, LayerPolicies)
        else _with_rules(over_float32(Policy(policy), variables), rules)
    )
    _build(model, sample)
    measures = sample is not None and has_call(model)
    steps = _compiled_steps(model)
    undo: Undo = []
    try:
        plan = make_plan(
            model, wanted, undo, safe_layers=safe_layers, variables=variables, sample=sample
        )
        for text, category in plan.warnings:
            warnings.warn(text, category, stacklevel=2)
        if not dry_run or measures:
            _carry_out(plan, undo)
        costs = {}
        if measures:
            with _calls_on_sample(model):
                costs = measure(model, sample)
        if dry_run:
            take_back(undo)
            _put_compiled_steps_back(steps)
        to = f'"{wanted}"' if isinstance(wanted, Policy) else "the policies of a text"
        return ConversionReport(
            model=model,
            policy=wanted if isinstance(wanted, Policy) else None,
            rows=[row._replace(cost=costs.get(id(row.layer))) for row in plan.rows],
            layer_policies=plan.layer_policies,
            notes=plan.notes,
            undo=undo,
            conversion=None
            if dry_run
            else begin(model, [row.layer for row in plan.rows], to, undo),
        )
    except BaseException:  # an interrupt, too
        try:
            take_back(undo)
        finally:
            _finish(undo, steps)
        raise


def _carry_out(plan: Plan, undo: Undo) -> None:
    """Change a model as a plan says.

    Args:
        plan: The plan.
        undo: Is given what takes each change back.
    """
    model = plan.model
    undo.append(functools.partial(_forget_compiled_steps, model))
    if plan.swaps or plan.policies:
        undo.append(functools.partial(refresh_symbolic_dtypes, model))
        if plan.swaps:
            swap(model, plan.swaps, undo)
        for layer, policy in plan.policies:
            undo.append(functools.partial(set_layer_policy, layer, layer.dtype_policy))
            set_layer_policy(layer, policy)
        refresh_symbolic_dtypes(model, plan.dtypes)
    change_variables(plan.variables, undo)
    if isinstance(model, keras.Model):
        _turn_to_ours(plan, undo)
    _forget_compiled_steps(model)


def change_variables(changes: Iterable[Change], undo: Undo) -> None:
    """Change the dtype of variables in place. Policies and compiled steps are left alone.

    Args:
        changes: What `plan_variables` returned.
        undo: Is given what puts each variable back, at once. Until it is dropped, the values of
            before stay in memory.
    """
    for layer, dtype, variables in changes:
        for name, initializer in loadable_initializers(layer, dtype).items():
            _set(layer, name, initializer, undo)
        for variable in variables:
            undo.append(set_variable_dtype(variable, dtype))


def _turn_to_ours(plan: Plan, undo: Undo) -> None:
    """Make a model one of ours, which scales its loss and keeps the policies of its layers."""
    model = plan.model
    if not isinstance(model, Model):  # one that was ours before keeps its guards
        undo.append(functools.partial(remove_guards, model))
    undo.append(functools.partial(object.__setattr__, model, "__class__", type(model)))
    scales = getattr(model, "_auto_scale_loss", True)
    _set(model, "_auto_scale_loss", scales, undo)
    _set(model, "_output_dtype", plan.output_dtype, undo)
    _set(model, "_saves_layer_policies", True, undo)
    for layer in layers_to_widen(model):
        put_back = functools.partial(object.__setattr__, layer, "activity_regularizer")
        undo.append(functools.partial(put_back, layer.activity_regularizer))
    widen_activity_regularizers(model)
    optimizer = getattr(model, "optimizer", None)  # a model that is not compiled may lack it
    undo.append(unnote_successor(model, optimizer))  # once the optimizer is back
    undo.append(functools.partial(_put_optimizer_back, model, optimizer))
    if plan.for_inference and optimizer is not None:
        model.optimizer = None
    Model.from_keras(model)
    adopt_optimizer(model, auto_scale_loss=scales)
    for part in flatten_layers(model):
        if isinstance(part, Model):
            # The rules that it was made under act no more, as in one that was turned.
            _set(part, "_rules", Model._rules, undo)  # noqa: SLF001 - ours
            if plan.variables:
                is_half = any(variable.dtype in HALVES for variable in part.variables)
                _set(part, "_for_inference", is_half, undo)


def _set(layer: Any, name: str, value: Any, undo: Undo) -> None:
    """Set an attribute of a layer or model, which may be one of its class alone."""
    undo.append(functools.partial(_put_back, layer, name, vars(layer).get(name, _MISSING)))
    setattr(layer, name, value)


def _put_back(layer: Any, name: str, value: Any) -> None:
    if value is not _MISSING:
        setattr(layer, name, value)
    elif name in vars(layer):
        delattr(layer, name)


def _put_optimizer_back(model: Any, optimizer: Any) -> None:
    """Give a model the optimizer that it had, unless the user has compiled it anew since."""
    now = getattr(model, "optimizer", None)
    inner = getattr(now, "inner_optimizer", None)
    before = (optimizer, getattr(optimizer, "inner_optimizer", None))
    is_let_go = now is None and optimizer is not None
    if is_let_go or (inner is not None and any(inner is each for each in before)):
        model.optimizer = optimizer


def _compiled_steps(model: Any) -> list[tuple[Any, str, Any]]:
    """Return the compiled steps of a model and of all models inside: owner, name, function."""
    models = [layer for layer in flatten_layers(model) if isinstance(layer, keras.Model)]
    return [(each, name, getattr(each, name, None)) for each in models for name in _COMPILED]


def _finish(undo: Undo, steps: list[tuple[Any, str, Any]]) -> None:
    """Take back what an interrupt has left, and put the compiled steps back in any case."""
    try:
        take_back(undo)
    finally:
        _put_compiled_steps_back(steps)


def _put_compiled_steps_back(steps: list[tuple[Any, str, Any]]) -> None:
    for model, name, step in steps:
        setattr(model, name, step)


def _forget_compiled_steps(model: Any) -> None:
    """Let a model, and all models inside it, compile their steps anew."""
    for each, name, _ in _compiled_steps(model):
        setattr(each, name, None)


def _refuse_beside_text(policy: object, rules: object, *, safe_layers: bool) -> None:
    if isinstance(policy, LayerPolicies) and (safe_layers or rules not in ("safe", None)):
        raise PolicyError(
            "LayerPolicies say all of each layer, and leave nothing to rules.",
            received=f"LayerPolicies with rules={rules!r}, safe_layers={safe_layers}",
            expected="LayerPolicies alone",
            fix="Change the text, or convert by a policy with rules.",
        )


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
        build_with(model, sample)
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


def _with_rules(policy: Policy, rules: RulesLike) -> Policy:
    return Policy(policy, rules=[rules, policy.rules, "safe" if policy.safe else None])
