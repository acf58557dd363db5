"""Half-precision variables: who may have them, what a conversion does about them, what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kerasmp.backend.keras_private import flatten_layers
from kerasmp.conversion.compiled import set_attribute
from kerasmp.conversion.variables import Narrowed, Wanted, narrow_variables
from kerasmp.errors import PolicyError
from kerasmp.model import Model
from kerasmp.model.inference import let_go_optimizer
from kerasmp.policy import Policy
from kerasmp.policy.apply import refuse_other_variables
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterable

    from kerasmp.policy.assign import Assignment

_ASKED = (*HALVES, "float32")


def check_asked(variables: str | None) -> None:
    """Raise if `variables` is no dtype for variables.

    Args:
        variables: What `convert` was given.

    Raises:
        PolicyError: If it is none of "float16", "bfloat16", "float32" and None.
    """
    if variables is not None and not (isinstance(variables, str) and variables in _ASKED):
        raise PolicyError(
            "Variables cannot have this dtype.",
            received=f"variables={variables!r}",
            expected=", ".join(map(repr, _ASKED)) + " or None",
            fix="Leave it out to train: variables are float32 then.",
        )


def over_float32(policy: Policy, variables: str | None) -> Policy:
    """Return the policy that layers are assigned by: rules take float32 variables for granted.

    Args:
        policy: The policy as it was given, "float16" or "mixed_float16" for example.
        variables: The dtype that variables are to have.
    """
    if variables not in HALVES or policy.variable_dtype != variables:
        return policy
    output = f",output={policy.output_dtype}" if policy.output_dtype else ""
    mixed = f"variable=float32,compute={policy.compute_dtype}{output}"
    return Policy(mixed, rules=policy.rules)


def with_variables(rows: Iterable[Assignment], variables: str | None) -> list[Assignment]:
    """Return what layers are assigned if those that compute in `variables` also keep theirs so.

    Args:
        rows: What `assign` returned.
        variables: The dtype that variables are to have.

    Raises:
        PolicyError: If a layer's variables would have to change to what nobody has asked for.
    """
    mixed = f"mixed_{variables}"
    rows = [
        row._replace(after=str(variables)) if row.after == mixed and variables in HALVES else row
        for row in rows
    ]
    for row in rows:
        have, want = _variable_dtypes(row)
        widens = have in HALVES and want == "float32"  # to the last bit
        if want != variables and not widens:
            refuse_other_variables(row)
    if variables in HALVES and all(_variable_dtypes(row)[1] != variables for row in rows):
        raise PolicyError(
            f"No layer computes in {variables}, so that none can have its variables in it.",
            received=f"variables={variables!r}, and layers under "
            + ", ".join(sorted({row.after for row in rows})),
            expected="a policy that computes in the dtype of the variables",
            fix=f'convert(model, "{variables}", variables="{variables}") is one way.',
        )
    return rows


def _variable_dtypes(row: Assignment) -> tuple[str, str]:
    """Return the dtypes of variables of a layer's policy, now and after."""
    return str(row.policy.variable_dtype), str(row.policy_after.variable_dtype)


def change_variables(rows: Iterable[Assignment], undo: contextlib.ExitStack) -> list[Narrowed]:
    """Let the variables of layers follow their new policies.

    Args:
        rows: What `with_variables` returned.
        undo: Takes what puts the variables back.

    Returns:
        What became of the variables of each layer whose policy wants them otherwise.
    """
    rows = list(rows)
    pairs = [_variable_dtypes(row) for row in rows]
    wanted = [
        Wanted(row.layer, row.path, after if after != before else None)
        for row, (before, after) in zip(rows, pairs, strict=True)
    ]
    if all(each.dtype is None for each in wanted):
        return []
    facts = zip(narrow_variables(wanted, undo), wanted, strict=True)
    return [narrowed for narrowed, each in facts if each.dtype is not None]


def any_half(model: Any) -> bool:
    """Return whether any variable of a model or layer is float16 or bfloat16."""
    return any(variable.dtype in HALVES for variable in model.variables)


def stop_training(model: Any, undo: contextlib.ExitStack) -> list[str]:
    """Let go the optimizer of a model that is to be for inference.

    Args:
        model: The model, before it is turned into one of ours.
        undo: Takes what puts it back.

    Returns:
        What there is to say of it.
    """
    optimizer = let_go_optimizer(model, undo)
    if optimizer is None:
        return []
    name = type(getattr(optimizer, "inner_optimizer", optimizer)).__name__
    return [f"the optimizer {name} is let go with its state: the model is for inference"]


def let_train_or_refuse(
    model: Any, changed: list[Narrowed], undo: contextlib.ExitStack
) -> list[str]:
    """Let a model whose variables have changed, and those inside, refuse to train, or train again.

    Args:
        model: The model, one of ours unless it is a layer.
        changed: What `change_variables` returned.
        undo: Takes what puts it back.

    Returns:
        What there is to say of it, and of the variables.
    """
    if not changed:
        return []
    for part in flatten_layers(model):
        if isinstance(part, Model):
            set_attribute(part, "_for_inference", any_half(part), undo)
    if not isinstance(model, Model):
        return [_said(changed)]
    return [
        _said(changed),
        "variables in half precision: the model refuses to be trained"
        if any_half(model)
        else "variables are float32 again, less what rounding took: compile it to train it",
    ]


def _said(changed: list[Narrowed]) -> str:
    before, after = (
        sum(getattr(each, name) for each in changed) for name in ("bytes_before", "bytes_after")
    )
    zeros = sum(each.zeros for each in changed)
    error = max(each.error for each in changed)
    rounding = (
        f"; rounding changes numbers by up to {error:.2g} of their size, and makes {zeros} 0"
        if error or zeros
        else ""
    )
    return f"variables of {len(changed)} layers take {after:,} bytes, not {before:,}{rounding}"
