"""Half-precision variables: who may have them, and what rounding does to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import keras
import numpy as np

from kerasmp.backend.keras_internals import flatten_layers, own_variables
from kerasmp.backend.variable_dtypes import takes_dtype
from kerasmp.errors import PolicyError
from kerasmp.policy import Policy
from kerasmp.policy.apply import check_variable_dtype
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kerasmp.policy.assign import Assignment

_ASKED = (*HALVES, "float32")
_NAMED = 3  # so many variables does an error name
# A layer, the dtype that its variables get, and those of them that have another one.
Change: TypeAlias = tuple[Any, str, list[Any]]


@keras.saving.register_keras_serializable(package="kerasmp")
class Orthogonal(keras.initializers.Orthogonal):
    """`keras.initializers.Orthogonal` that computes in float32 and rounds.

    Keras's own, the default of LSTM and GRU, raises in bfloat16, and on JAX and torch in float16:
    no backend has a QR decomposition there. Loading a model calls initializers before it reads the
    values.

    Args:
        gain: As for Keras's.
        seed: As for Keras's.

    Example:

    >>> keras.backend.standardize_dtype(Orthogonal()((4, 4), dtype="bfloat16").dtype)
    'bfloat16'
    """

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """Return the initial values, rounded to `dtype`."""
        dtype = keras.backend.standardize_dtype(dtype)
        return keras.ops.cast(super().__call__(shape, dtype="float32"), dtype)


class Narrowed(NamedTuple):
    """What becomes of a layer's own variables; those that it shares count for the first layer.

    Args:
        path: The layer's path.
        bytes_before: Their size before, of those that stayed as they are too.
        bytes_after: Their size after.
        zeros: How many numbers became 0 that were not.
        error: The largest relative rounding error of all others.
    """

    path: str
    bytes_before: int
    bytes_after: int
    zeros: int
    error: float


class _Rounding(NamedTuple):
    bytes_after: int
    zeros: int
    error: float
    largest: float  # of the finite numbers that became inf; 0 if there are none


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
            check_variable_dtype(row)
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


def plan_variables(rows: Iterable[Assignment]) -> tuple[list[Narrowed], list[Change]]:
    """Decide which float variables follow the new policies of their layers. Nothing is changed.

    Args:
        rows: What `with_variables` returned.

    Returns:
        What becomes of the variables of each layer whose policy wants them otherwise, and the
        changes.

    Raises:
        PolicyError: If a finite number would become inf, or layers that share a variable want it in
            two dtypes.

    Example:

    >>> from kerasmp.policy.assign import Assignment
    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 3))
    >>> row = Assignment(layer, "dense", layer.dtype_policy, "float16", "why")
    >>> [facts], changes = plan_variables([row])
    >>> facts.bytes_before, facts.bytes_after
    (32, 16)
    >>> [(dtype, len(variables)) for _, dtype, variables in changes]
    [('float16', 2)]
    """
    rows = list(rows)
    if not any(map(_new_dtype, rows)):
        return [], []
    owned = [(row, variables) for row, variables in _each_once(rows) if _new_dtype(row)]
    done = [_checked(row, variables) for row, variables in owned]
    _refuse_infinities(problem for _, problems in done for problem in problems)
    changes = [
        (row.layer, str(_new_dtype(row)), [each for each in variables if _changes(each, row)])
        for row, variables in owned
    ]
    return [facts for facts, _ in done], changes


def rounding_said(changed: list[Narrowed]) -> str:
    """Return what there is to say of variables that change, in words."""
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


def loadable_initializers(layer: Any, dtype: str) -> dict[str, Any]:
    """Return initializers, by attribute, for those of a layer that raise in half precision.

    Args:
        layer: The layer; those inside are left alone.
        dtype: That of its variables. In a wide one Keras's own initializers come back.
    """
    theirs, ours = keras.initializers.Orthogonal, Orthogonal
    old, new = (theirs, ours) if dtype in HALVES else (ours, theirs)
    return {
        name: new(**value.get_config()) for name, value in vars(layer).items() if type(value) is old
    }


def _new_dtype(row: Assignment) -> str | None:
    """Return the dtype that a layer's variables are to have; None for the one that they have."""
    before, after = _variable_dtypes(row)
    return after if after != before else None


def _each_once(rows: list[Assignment]) -> list[tuple[Assignment, list[Any]]]:
    """Return each row with the variables that are its own.

    Those that a wrapper keeps of what it wraps, as SpectralNormalization does, belong to the inner
    layer, which made them; those that other layers share, to the first.

    Raises:
        PolicyError: If two rows want one variable in different dtypes.
    """
    owners: dict[int, Assignment] = {}
    for row in rows:
        for variable in own_variables(row.layer):
            owner = owners.setdefault(id(variable), row)
            if owner is not row and any(each is row.layer for each in flatten_layers(owner.layer)):
                owners[id(variable)] = row
            elif owner is not row and (_changes(variable, owner) or _changes(variable, row)):
                _refuse_two_dtypes(variable, owner, row)
    return [
        (row, [v for v in _once(own_variables(row.layer)) if owners[id(v)] is row]) for row in rows
    ]


def _once(variables: list[Any]) -> list[Any]:
    return list({id(variable): variable for variable in variables}.values())


def _refuse_two_dtypes(variable: Any, one: Assignment, other: Assignment) -> None:
    if _new_dtype(one) != _new_dtype(other):
        raise PolicyError(
            f'Two layers share the variable "{variable.path}" and want it in different dtypes.',
            received=" and ".join(
                f'"{row.path}" in {_new_dtype(row) or "the one that it has"}'
                for row in (one, other)
            ),
            expected="one dtype for both",
            fix="Give both layers the same rule.",
        )


def _changes(variable: Any, row: Assignment) -> bool:
    dtype = _new_dtype(row)
    return dtype is not None and takes_dtype(variable, dtype)


def _checked(
    row: Assignment, variables: list[Any]
) -> tuple[Narrowed, list[tuple[Assignment, Any, float]]]:
    """Return what becomes of a layer's variables, and those that do not fit.

    NumPy rounds as the frameworks do. One variable is in memory at a time.
    """
    facts, problems = Narrowed(row.path, 0, 0, 0, 0.0), []
    for variable in variables:
        values = _values(variable)
        rounding = _Rounding(values.nbytes, 0, 0.0, 0.0)
        if _changes(variable, row):
            rounding = _rounding(values, str(_new_dtype(row)))
        facts = Narrowed(
            row.path,
            facts.bytes_before + values.nbytes,
            facts.bytes_after + rounding.bytes_after,
            facts.zeros + rounding.zeros,
            max(facts.error, rounding.error),
        )
        if rounding.largest:
            problems.append((row, variable, rounding.largest))
    return facts, problems


def _values(variable: Any) -> Any:
    value = variable.value
    # Keras cannot make a NumPy array of a bfloat16 scalar on TensorFlow.
    return keras.ops.convert_to_numpy(value if value.shape else keras.ops.reshape(value, (1,)))


def _numpy_dtype(dtype: str) -> Any:
    # NumPy itself has no bfloat16; Keras knows whose to take.
    return keras.ops.convert_to_numpy(keras.ops.zeros(1, dtype)).dtype


def _rounding(values: Any, dtype: str) -> _Rounding:
    wide = values if values.dtype == np.float64 else values.astype("float32")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = values.astype(_numpy_dtype(dtype))
        # Exact: no dtype here is wider than `wide`, but those that round nothing.
        back = rounded.astype(wide.dtype)
        finite = np.isfinite(wide)
        overflow = finite & ~np.isfinite(back)
        lost = (wide != 0) & (back == 0)
        kept = finite & ~overflow & ~lost & (wide != 0)
        errors = np.abs(back[kept] - wide[kept]) / np.abs(wide[kept])
    largest = np.max(np.abs(wide[overflow]), initial=0.0)
    zeros = int(np.count_nonzero(lost))
    return _Rounding(rounded.nbytes, zeros, float(np.max(errors, initial=0.0)), float(largest))


def _refuse_infinities(problems: Iterable[tuple[Assignment, Any, float]]) -> None:
    found = list(problems)
    if not found:
        return
    said = [f'"{v.path}" of "{row.path}" up to {size:.6g}' for row, v, size in found[:_NAMED]]
    more = f", and {len(found) - _NAMED} variables more" if len(found) > _NAMED else ""
    dtype = _new_dtype(found[0][0])
    paths = dict.fromkeys(row.path for row, _, _ in found)
    rules = ", ".join(f'"{path}": "float32"' for path in paths)
    wider = "" if dtype == "bfloat16" else ', or take variables="bfloat16"'
    raise PolicyError(
        f"Finite numbers would become inf in {dtype} variables.",
        received=f"{', '.join(said)}{more}",
        expected=f"numbers up to {float(np.finfo('float16').max):g}"
        if dtype == "float16"
        else f"numbers that {dtype} has",
        fix=f"Keep what does not fit in float32, rules={{{rules}}}{wider}.",
    )
