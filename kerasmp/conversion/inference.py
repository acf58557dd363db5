"""Half-precision variables: who may have them, what a conversion does about them, what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.conversion.variables import Narrowed, Wanted, narrow_variables
from kerasmp.errors import PolicyError
from kerasmp.model import Model
from kerasmp.model.inference import only_for_inference
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
    if variables is not None and variables not in _ASKED:
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
        have, want = map(variable_dtype, (row.before, row.after))
        widens = have in HALVES and want == "float32"  # to the last bit
        if want != variables and not widens:
            refuse_other_variables(row)
    if variables in HALVES and all(variable_dtype(row.after) != variables for row in rows):
        raise PolicyError(
            f"No layer computes in {variables}, so that none can have its variables in it.",
            received=f"variables={variables!r}, and layers under "
            + ", ".join(sorted({row.after for row in rows})),
            expected="a policy that computes in the dtype of the variables",
            fix=f'convert(model, "{variables}", variables="{variables}") is one way.',
        )
    return rows


def variable_dtype(policy: str) -> str:
    """Return the dtype in which layers under a Keras policy keep their variables."""
    return str(keras.dtype_policies.get(policy).variable_dtype)


def change_variables(rows: Iterable[Assignment], undo: contextlib.ExitStack) -> list[Narrowed]:
    """Let the variables of layers follow their new policies.

    Args:
        rows: What `with_variables` returned.
        undo: Takes what puts the variables back.

    Returns:
        What became of the variables of each layer whose policy wants them otherwise.
    """
    rows = list(rows)
    changes = [variable_dtype(row.before) != variable_dtype(row.after) for row in rows]
    if not any(changes):
        return []
    wanted = [
        Wanted(row.layer, row.path, variable_dtype(row.after) if change else None)
        for row, change in zip(rows, changes, strict=True)
    ]
    facts = zip(narrow_variables(wanted, undo), changes, strict=True)
    return [narrowed for narrowed, change in facts if change]


def let_train_or_refuse(
    model: Any,
    rows: Iterable[Assignment],
    changed: list[Narrowed],
    undo: contextlib.ExitStack,
) -> list[str]:
    """Let a model whose variables have changed refuse to train, or train again.

    Args:
        model: The model, one of ours unless it is a layer.
        rows: All that is assigned.
        changed: What `change_variables` returned.
        undo: Takes what puts it back.

    Returns:
        What there is to say of it, and of the variables.
    """
    if not changed:
        return []
    half = sorted({variable_dtype(row.after) for row in rows} & set(HALVES))
    notes = [_said(changed)]
    if not isinstance(model, Model):
        return notes
    if half:
        only_for_inference(model, undo)
        return [*notes, f"variables in {' and '.join(half)}: the model refuses to be trained"]
    undo.callback(setattr, model, "_for_inference", model._for_inference)  # noqa: SLF001 - ours
    model._for_inference = False  # noqa: SLF001
    return [*notes, "variables are float32 again, less what rounding took: compile it to train it"]


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
