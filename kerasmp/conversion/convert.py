"""Converts a built or loaded model to another policy, and back, step by step as a plan says."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import called_parts, has_call, refresh_symbolic_dtypes
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.backend.side_effects import preserve_losses
from kerasmp.backend.variable_dtypes import set_variable_dtype
from kerasmp.conversion.costs import measure
from kerasmp.conversion.half_variables import (
    check_variables,
    loadable_initializers,
    over_float32,
)
from kerasmp.conversion.order import begin
from kerasmp.conversion.plan import make_plan
from kerasmp.conversion.report import ConversionReport
from kerasmp.conversion.trial import raised
from kerasmp.errors import (
    ArgumentError,
    KerasMPError,
    PolicyError,
    PolicyWarning,
    check_bool,
    check_model,
    first_line,
    with_type,
)
from kerasmp.layers.from_stock import apply_swaps
from kerasmp.model import Model
from kerasmp.model.float32 import layers_to_widen, widen_activity_regularizers
from kerasmp.model.guards import remove_guards
from kerasmp.model.optimizers import adopt_optimizer
from kerasmp.optimizer.scale_tracking import undo_replacement
from kerasmp.policy import LayerPolicies, Policy
from kerasmp.policy.apply import set_policies, take_back
from kerasmp.policy.follow import build_with
from kerasmp.policy.spec import HALVES
from kerasmp.probe import probe_findings
from kerasmp.probe.batch import data_findings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kerasmp.conversion.half_variables import Change
    from kerasmp.conversion.plan import Plan
    from kerasmp.policy.apply import Undo
    from kerasmp.policy.policy import PolicyLike, RulesLike
    from kerasmp.probe import Finding

# The compiled steps that a Keras model holds. They would keep computing in the dtypes from before.
_COMPILED = ("train_function", "test_function", "predict_function")
_MISSING = object()


def convert(  # noqa: PLR0913 - all but two are keyword-only
    model: Any,
    policy: PolicyLike | LayerPolicies = "mixed_float16",
    *,
    rules: RulesLike = "safe",
    safe_layers: bool = False,
    variables: str | None = None,
    sample: Any = None,
    dry_run: bool = False,
) -> ConversionReport:
    """Convert a built or loaded model to another policy, in place.

    Weights stay the same to the last bit. Symbolic tensors such as `model.outputs` get the new
    dtypes, and compiled steps are compiled again. The model becomes a kerasmp model as by
    `Model.from_keras`: its loss is scaled, a skipped step changes nothing, and its files contain
    the policy of each layer. The optimizer of a compiled model is wrapped, with its state. Another
    model that shares layers with this one sees them in the new dtypes, but keeps the steps that it
    has compiled. Layers that cannot compute in half precision stay in float32, and the report says
    why. If anything fails, the model is unchanged, except that a model built with `sample` stays
    built.

    Args:
        model: A Keras model of any kind, stock or kerasmp's, that has been built. Of one without a
            `call`, such as a GAN, the parts that are built are converted.
        policy: A policy, or anything that `Policy` accepts, default "mixed_float16"; or the
            `LayerPolicies` of an earlier conversion, also of another build of the same model.
        rules: Rules as for `Policy`, in addition to those of `policy`; default "safe". None adds
            none.
        safe_layers: Also replace stock layers by their counterparts in `kerasmp.layers`, in place
            and with their weights, so that more of the model can stay in half precision. With
            `LayerPolicies`, the text decides this.
        variables: "float16" or "bfloat16" for inference only: layers that compute in it also store
            their variables in it, in half the bytes, and the model refuses to be trained. "float32"
            undoes that, except for the rounding, as does any policy with float32 variables. None,
            the default, narrows no variables.
        sample: A batch of inputs. The converted model is called on it eagerly, three times. The
            report contains the cost of each layer: multiply-adds, bytes of activations and of
            casts. It also contains, as from `kerasmp.lint`, the findings of layers and operations
            whose values differ from those in float32 by more than rounding explains. Without it
            these are unknown. A model that is not built is first built with it, before
            anything is checked and in a dry run too, and stays built.
        dry_run: Only report what would be done.

    Returns:
        A report with one row for each layer. It prints as a table, and has `restore()`.

    Raises:
        PolicyError: If the policy does not exist, two rules disagree, a pattern matches no layer,
            the model is not built, weights would get a dtype that was not asked for, a weight would
            become inf in it, a policy would quantize a layer, or a rule wants a layer in half
            precision that cannot compute in it.
        ArgumentTypeError: If `model` is not a Keras model, or a switch is not a bool.
        ArgumentError: If `sample` is not a batch, or the model cannot be called on it.

    Warns:
        LossScaleWarning: If float16 layers are trained and an attribute of the model holds an
            optimizer that does not scale the loss.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    >>> report = convert(model, "mixed_float16")
    >>> [layer.compute_dtype for layer in model.layers]
    ['float16', 'float32']
    >>> report.restore()
    >>> [layer.compute_dtype for layer in model.layers]
    ['float32', 'float32']
    """
    check_model(model, "be converted", fix="Pass the model first, then the policy.")
    check_bool("safe_layers", safe_layers)
    check_bool("dry_run", dry_run)
    check_variables(variables)
    wanted: Policy | LayerPolicies
    if isinstance(policy, LayerPolicies):
        _refuse_other_choices(rules, safe_layers=safe_layers)
        wanted, name = policy, "LayerPolicies"
    else:
        base = over_float32(Policy(policy), variables)
        wanted = Policy(base, rules=[rules, base.rules, "safe" if base.safe else None])
        name = f'"{wanted}"'
    _check_sample(sample)
    _build(model, sample)
    measures = sample is not None and has_call(model)
    undo: Undo = []
    try:
        plan = make_plan(
            model, wanted, undo, safe_layers=safe_layers, variables=variables, sample=sample
        )
        for text, category in plan.warnings:
            warnings.warn(text, category, stacklevel=2)
        if not dry_run or measures:
            _carry_out(plan, undo)
        costs, findings = {}, []
        if measures:
            with _calls_on_sample(model, sample):
                costs = measure(model, sample)
            findings = _probed(model, sample)
        report = ConversionReport(
            model=model,
            policy=wanted if isinstance(wanted, Policy) else None,
            rows=[row._replace(cost=costs.get(id(row.layer))) for row in plan.rows],
            layer_policies=plan.layer_policies,
            notes=plan.notes,
            findings=findings,
            undo=undo,
            conversion=None
            if dry_run
            else begin(model, [row.layer for row in plan.rows], name, undo),
        )
        if dry_run:
            take_back(undo)
        else:
            # The steps that were compiled before are for an error only: `restore` forgets them.
            undo[0] = functools.partial(_forget_compiled_steps, model)
    except BaseException:  # an interrupt, too
        take_back(undo)
        raise
    return report


def _probed(model: Any, sample: Any) -> list[Finding]:
    """Return what the values of a sample show; a warning if they cannot be compared."""
    try:
        return [*data_findings(sample=sample), *probe_findings(model, sample)]
    except Exception as error:  # noqa: BLE001 - a user's layer may raise anything
        text = f"The sample was not compared with float32, as this raised {first_line(error)}."
        warnings.warn(text, PolicyWarning, stacklevel=3)
        return []


def _carry_out(plan: Plan, undo: Undo) -> None:
    """Change a model as a plan says.

    Args:
        plan: The plan.
        undo: An empty list, which gets the functions that undo the changes. The first one puts the
            compiled steps back.
    """
    model = plan.model
    undo.append(functools.partial(_put_compiled_steps_back, _compiled_steps(model)))
    if plan.swaps or plan.policies:
        undo.append(functools.partial(refresh_symbolic_dtypes, model))
        if plan.swaps:
            apply_swaps(model, plan.swaps, undo)
        set_policies(plan.policies, undo)
        refresh_symbolic_dtypes(model, plan.dtypes)
    change_variables(plan.variables, undo)
    if isinstance(model, keras.Model):
        _adopt(plan, undo)
    _forget_compiled_steps(model)


def change_variables(changes: Iterable[Change], undo: Undo) -> None:
    """Change the dtype of variables in place. Policies and compiled steps are left alone.

    Args:
        changes: What `plan_variables` returned.
        undo: Gets, with each change, the function that undoes it. It holds the old values.
    """
    for layer, dtype, variables in changes:
        for name, initializer in loadable_initializers(layer, dtype).items():
            _set(layer, name, initializer, undo)
        for variable in variables:
            undo.append(set_variable_dtype(variable, dtype))


def _adopt(plan: Plan, undo: Undo) -> None:
    """Make a model a kerasmp model, which scales its loss and saves the policies of its layers."""
    model = plan.model
    if not isinstance(model, Model):  # a kerasmp model keeps its guards
        undo.append(functools.partial(remove_guards, model))
    undo.append(functools.partial(object.__setattr__, model, "__class__", type(model)))
    auto_scale_loss = getattr(model, "_auto_scale_loss", True)
    _set(model, "_auto_scale_loss", auto_scale_loss, undo)
    _set(model, "_output_dtype", plan.output_dtype, undo)
    _set(model, "_saves_layer_policies", True, undo)
    for layer in layers_to_widen(model):
        put_back = functools.partial(object.__setattr__, layer, "activity_regularizer")
        undo.append(functools.partial(put_back, layer.activity_regularizer))
    widen_activity_regularizers(model)
    optimizer = getattr(model, "optimizer", None)  # a model that is not compiled may lack it
    undo.append(undo_replacement(model, optimizer))  # runs after the optimizer is put back
    undo.append(functools.partial(_put_optimizer_back, model, optimizer))
    if plan.for_inference and optimizer is not None:
        model.optimizer = None
    Model.from_keras(model)
    adopt_optimizer(model, auto_scale_loss=auto_scale_loss)
    for part in flatten_layers(model):
        if isinstance(part, Model):
            # As in an adopted model, the rules that it was made under no longer apply.
            _set(part, "_rules", Model._rules, undo)  # noqa: SLF001 - kerasmp's own
            if plan.variables:
                is_half = any(variable.dtype in HALVES for variable in part.variables)
                _set(part, "_for_inference", is_half, undo)


def _set(layer: Any, name: str, value: Any, undo: Undo) -> None:
    """Set an attribute of a layer or model that may so far have existed on its class only."""
    undo.append(functools.partial(_put_back, layer, name, vars(layer).get(name, _MISSING)))
    setattr(layer, name, value)


def _put_back(layer: Any, name: str, value: Any) -> None:
    if value is not _MISSING:
        setattr(layer, name, value)
    elif name in vars(layer):
        delattr(layer, name)


def _put_optimizer_back(model: Any, optimizer: Any) -> None:
    """Give a model its old optimizer again, unless the user has compiled it anew since."""
    now = getattr(model, "optimizer", None)
    inner = getattr(now, "inner_optimizer", None)
    before = (optimizer, getattr(optimizer, "inner_optimizer", None))
    was_removed = now is None and optimizer is not None
    if was_removed or (inner is not None and any(inner is each for each in before)):
        model.optimizer = optimizer


def _compiled_steps(model: Any) -> list[tuple[Any, str, Any]]:
    """Return the compiled steps of a model and of the models in it: owner, name and function."""
    models = [layer for layer in flatten_layers(model) if isinstance(layer, keras.Model)]
    return [(each, name, getattr(each, name, None)) for each in models for name in _COMPILED]


def _put_compiled_steps_back(steps: list[tuple[Any, str, Any]]) -> None:
    for model, name, step in steps:
        setattr(model, name, step)


def _forget_compiled_steps(model: Any) -> None:
    """Make a model, and all models in it, compile their steps again."""
    for each, name, _ in _compiled_steps(model):
        setattr(each, name, None)


def _refuse_other_choices(rules: object, *, safe_layers: bool) -> None:
    if safe_layers or rules not in ("safe", None):
        raise PolicyError(
            "LayerPolicies set the policy of each layer, and leave nothing to rules.",
            received=f"LayerPolicies with rules={rules!r}, safe_layers={safe_layers}",
            expected="LayerPolicies alone",
            fix="Change the text, or convert by a policy with rules.",
        )


def _check_sample(sample: Any) -> None:
    """Raise an error about a sample without rows, which shows nothing."""
    leaves = keras.tree.flatten(sample)
    shapes = [tuple(each.shape) for each in leaves if hasattr(each, "shape")]
    if sample is not None and (not leaves or any(shape[:1] == (0,) for shape in shapes)):
        raise ArgumentError(
            "`sample` is not a batch.",
            received=f"{with_type(sample)} without rows",
            expected="a batch as model.predict_on_batch takes it",
            fix="Pass such a batch, or leave `sample` out.",
        )


def _build(model: Any, sample: Any) -> None:
    """Build a model with a sample if it is not built.

    Raises:
        PolicyError: If there is no sample, or no part of a model without a `call` is built.
    """
    parts = called_parts(model)
    is_callable = has_call(model)
    if is_callable and not model.built and sample is not None:
        build_with(model, sample)
        if not model.built:
            with _calls_on_sample(model, sample), preserve_losses(model):
                model(sample, training=False)
    if not any(part.built for part in parts):
        reason = "" if is_callable else ", which has no call, and none of its parts is built"
        raise PolicyError(
            "The model is not built, and layers that are created later would not be converted.",
            received=f'the model "{model.name}"{reason}',
            expected="a built model",
            fix="Pass a batch of inputs as sample=, or call the model on one first, or build it "
            "under kerasmp.policy_scope(policy)."
            if is_callable
            else "Call its parts on a batch first.",
        )


@contextlib.contextmanager
def _calls_on_sample(model: Any, sample: Any) -> Iterator[None]:
    """Raise an error about the sample if calling a model on it raises.

    Raises:
        ArgumentError: If so.
    """
    described = ", ".join(
        f"{each.dtype} of shape {tuple(each.shape)}" if hasattr(each, "shape") else with_type(each)
        for each in keras.tree.flatten(sample)
    )
    try:
        yield
    except KerasMPError:
        raise
    except Exception as error:
        raise ArgumentError(
            "The model cannot be called on `sample`.",
            received=f"{described}, for {raised(model, error)}",
            expected="a batch as model.predict_on_batch takes it",
            fix="Pass such a batch, or leave `sample` out.",
        ) from error
