"""Half-precision variables: which layers get them, and what rounding does to their values."""

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

_CHOICES = (*HALVES, "float32")
_MAX_NAMED = 3  # how many variables an error names
# A layer, the dtype that its variables get, and those of them that have another one.
Change: TypeAlias = tuple[Any, str, list[Any]]
# A variable whose values do not fit, its layer, and the largest value.
_Misfit: TypeAlias = "tuple[Assignment, Any, float]"


@keras.saving.register_keras_serializable(package="kerasmp")
class Orthogonal(keras.initializers.Orthogonal):
    """`keras.initializers.Orthogonal` that computes in float32 and rounds the result.

    Keras's own, the default of LSTM and GRU, raises in bfloat16, and on JAX and torch in float16,
    where no backend has a QR decomposition. Loading a model calls initializers before it reads the
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
    """What happens to a layer's own variables; shared ones count for the first layer.

    Args:
        path: The layer's path.
        bytes_before: Their size before, including those that do not change.
        bytes_after: Their size after.
        zeros: How many nonzero values become 0.
        error: The largest relative rounding error of all other values.
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
    overflow: float  # the largest of the finite values that become inf; 0 if there are none


def check_variables(variables: str | None) -> None:
    """Raise unless `convert` accepts this value for `variables`.

    Raises:
        PolicyError: If it is none of "float16", "bfloat16", "float32" and None.
    """
    if variables is not None and not (isinstance(variables, str) and variables in _CHOICES):
        raise PolicyError(
            "Variables cannot have this dtype.",
            received=f"variables={variables!r}",
            expected=", ".join(map(repr, _CHOICES)) + " or None",
            fix="Leave it out to train with float32 variables.",
        )


def over_float32(policy: Policy, variables: str | None) -> Policy:
    """Return a policy with float32 variables, which is what rules assume.

    Args:
        policy: The policy that the user gave, such as "float16" or "mixed_float16".
        variables: The dtype that variables are to have.
    """
    if variables not in HALVES or policy.variable_dtype != variables:
        return policy
    output = f",output={policy.output_dtype}" if policy.output_dtype else ""
    mixed = f"variable=float32,compute={policy.compute_dtype}{output}"
    return Policy(mixed, rules=policy.rules)


def with_variables(rows: Iterable[Assignment], variables: str | None) -> list[Assignment]:
    """Return the assignments in which layers that compute in `variables` also have variables in it.

    Args:
        rows: What `assign` returned.
        variables: The dtype that variables are to have.

    Raises:
        PolicyError: If a layer's variables would get a dtype that the user did not ask for.
    """
    mixed = f"mixed_{variables}"
    rows = [
        row._replace(after=str(variables)) if row.after == mixed and variables in HALVES else row
        for row in rows
    ]
    for row in rows:
        have, want = _variable_dtypes(row)
        widens = have in HALVES and want == "float32"  # which is exact
        if want != variables and not widens:
            check_variable_dtype(row)
    if variables in HALVES and all(_variable_dtypes(row)[1] != variables for row in rows):
        raise PolicyError(
            f"No layer computes in {variables}, so none can have {variables} variables.",
            received=f"variables={variables!r}, and layers under "
            + ", ".join(sorted({row.after for row in rows})),
            expected="a policy that computes in the dtype of the variables",
            fix=f'Call convert(model, "{variables}", variables="{variables}"), for example.',
        )
    return rows


def _variable_dtypes(row: Assignment) -> tuple[str, str]:
    """Return the variable dtype of a layer's policy, before and after."""
    return str(row.policy.variable_dtype), str(row.policy_after.variable_dtype)


def plan_variables(rows: Iterable[Assignment]) -> tuple[list[Narrowed], list[Change]]:
    """Decide which float variables follow the new policies of their layers. Nothing is changed.

    Args:
        rows: What `with_variables` returned.

    Returns:
        What happens to the variables of each layer whose policy gets another variable dtype, and
        the changes.

    Raises:
        PolicyError: If a finite value would become inf, or if layers that share a variable want it
            in two dtypes.

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
    facts: list[Narrowed] = []
    changes: list[Change] = []
    misfits: list[_Misfit] = []
    if any(map(_new_dtype, rows)):
        for row, variables in _owned_variables(rows):
            dtype = _new_dtype(row)
            if dtype is not None:
                facts.append(_narrowed(row, dtype, variables, misfits))
                changes.append((row.layer, dtype, [v for v in variables if takes_dtype(v, dtype)]))
    if misfits:
        raise _overflow_error(misfits)
    return facts, changes


def summary(narrowed: list[Narrowed]) -> str:
    """Return what happens to variables in one sentence."""
    before = sum(each.bytes_before for each in narrowed)
    after = sum(each.bytes_after for each in narrowed)
    zeros = sum(each.zeros for each in narrowed)
    error = max(each.error for each in narrowed)
    rounding = (
        f"; rounding changes values by up to {error:.2g} of their size, and {zeros} become 0"
        if error or zeros
        else ""
    )
    return f"variables of {len(narrowed)} layers take {after:,} bytes, not {before:,}{rounding}"


def loadable_initializers(layer: Any, dtype: str) -> dict[str, Any]:
    """Return replacements, by attribute, for a layer's initializers that raise in half precision.

    Args:
        layer: The layer. Layers inside it are left alone.
        dtype: The dtype of its variables. In a wide one Keras's own initializers return.
    """
    stock, rounding = keras.initializers.Orthogonal, Orthogonal
    old, new = (stock, rounding) if dtype in HALVES else (rounding, stock)
    return {
        name: new(**value.get_config()) for name, value in vars(layer).items() if type(value) is old
    }


def _new_dtype(row: Assignment) -> str | None:
    """Return the dtype that a layer's variables get; None if it does not change."""
    before, after = _variable_dtypes(row)
    return after if after != before else None


def _owned_variables(rows: list[Assignment]) -> list[tuple[Assignment, list[Any]]]:
    """Return each row with the variables that it owns, each variable once.

    A variable that a wrapper refers to, as SpectralNormalization does, is owned by the inner layer,
    which created it. A variable that other layers share is owned by the first.

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
        (
            row,
            list({id(v): v for v in own_variables(row.layer) if owners[id(v)] is row}.values()),
        )
        for row in rows
    ]


def _refuse_two_dtypes(variable: Any, one: Assignment, other: Assignment) -> None:
    if _new_dtype(one) != _new_dtype(other):
        raise PolicyError(
            f'Two layers share the variable "{variable.path}" and want it in different dtypes.',
            received=" and ".join(
                f'"{row.path}" in {_new_dtype(row) or "its present dtype"}' for row in (one, other)
            ),
            expected="one dtype for both",
            fix="Give both layers the same rule.",
        )


def _changes(variable: Any, row: Assignment) -> bool:
    dtype = _new_dtype(row)
    return dtype is not None and takes_dtype(variable, dtype)


def _narrowed(
    row: Assignment, dtype: str, variables: list[Any], misfits: list[_Misfit]
) -> Narrowed:
    """Return what happens to a layer's variables, and add those that do not fit to a list.

    NumPy rounds as the frameworks do. One variable is in memory at a time.
    """
    before = after = zeros = 0
    error = 0.0
    for variable in variables:
        values = _values(variable)
        before += values.nbytes
        if not takes_dtype(variable, dtype):
            after += values.nbytes
            continue
        rounding = _rounding(values, dtype)
        after += rounding.bytes_after
        zeros += rounding.zeros
        error = max(error, rounding.error)
        if rounding.overflow:
            misfits.append((row, variable, rounding.overflow))
    return Narrowed(row.path, before, after, zeros, error)


def _values(variable: Any) -> Any:
    value = variable.value
    # Keras cannot make a NumPy array of a bfloat16 scalar on TensorFlow.
    return keras.ops.convert_to_numpy(value if value.shape else keras.ops.reshape(value, (1,)))


def _rounding(values: Any, dtype: str) -> _Rounding:
    # NumPy itself has no bfloat16; Keras knows whose to use.
    numpy_dtype = keras.ops.convert_to_numpy(keras.ops.zeros(1, dtype)).dtype
    wide = values if values.dtype == np.float64 else values.astype("float32")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = values.astype(numpy_dtype)
        # Exact: a dtype that is wider than `wide` rounds nothing.
        back = rounded.astype(wide.dtype)
        finite = np.isfinite(wide)
        overflow = finite & ~np.isfinite(back)
        lost = (wide != 0) & (back == 0)
        rest = finite & ~overflow & ~lost & (wide != 0)
        errors = np.abs(back[rest] - wide[rest]) / np.abs(wide[rest])
    largest = np.max(np.abs(wide[overflow]), initial=0.0)
    zeros = int(np.count_nonzero(lost))
    return _Rounding(rounded.nbytes, zeros, float(np.max(errors, initial=0.0)), float(largest))


def _overflow_error(misfits: list[_Misfit]) -> PolicyError:
    named = [
        f'"{v.path}" of "{row.path}" up to {size:.6g}' for row, v, size in misfits[:_MAX_NAMED]
    ]
    more = len(misfits) - _MAX_NAMED
    dtype = _new_dtype(misfits[0][0])
    paths = dict.fromkeys(row.path for row, _, _ in misfits)
    rules = ", ".join(f'"{path}": "float32"' for path in paths)
    wider = "" if dtype == "bfloat16" else ', or pass variables="bfloat16"'
    return PolicyError(
        f"Finite values would become inf in {dtype} variables.",
        received=", ".join(named) + (f", and {more} more variables" if more > 0 else ""),
        expected=f"values up to {float(np.finfo('float16').max):g}"
        if dtype == "float16"
        else f"values that {dtype} can represent",
        fix=f"Keep these layers in float32, rules={{{rules}}}{wider}.",
    )
