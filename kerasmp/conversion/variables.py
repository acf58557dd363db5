"""The variables of layers in another dtype, for inference from half the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from kerasmp.backend.keras_private import flatten_layers, own_variables
from kerasmp.backend.variable_dtypes import set_variable_dtype, takes_dtype
from kerasmp.conversion.initializers import make_loadable
from kerasmp.errors import PolicyError

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterable, Iterator

_NAMED = 3  # so many variables does an error name


class Wanted(NamedTuple):
    """The dtype that a layer's own variables are to have.

    Args:
        layer: The layer; what is inside of it has wishes of its own.
        path: Its path, as rules name it.
        dtype: The dtype; None for the one that they have.
    """

    layer: Any
    path: str
    dtype: str | None


class Narrowed(NamedTuple):
    """What became of a layer's own variables; those that it shares count for the first layer.

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


def narrow_variables(rows: Iterable[Wanted], undo: contextlib.ExitStack) -> list[Narrowed]:
    """Change the dtype of the float variables of layers in place, all of them or none.

    Policies are left alone, and so are steps that are compiled: both is the caller's.

    Args:
        rows: What each layer wants.
        undo: Is given what puts each variable back, at once. Until it is dropped, the values of
            before stay in memory.

    Returns:
        What became of each layer's variables, a row for each of `rows`.

    Raises:
        PolicyError: If a finite number would become inf, or layers that share a variable want it in
            two dtypes. Nothing has changed then.

    Example:

    >>> import contextlib
    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 3))
    >>> undo = contextlib.ExitStack()
    >>> row = narrow_variables([Wanted(layer, "dense", "float16")], undo)[0]
    >>> row.bytes_before, row.bytes_after, layer.kernel.dtype
    (32, 16, 'float16')
    >>> undo.close()
    >>> layer.kernel.dtype
    'float32'
    """
    wanted = _each_once(list(rows))
    done = [_checked(row, variables) for row, variables in wanted]
    _refuse_infinities(problem for _, problems in done for problem in problems)
    for row, variables in wanted:
        if row.dtype is not None:
            make_loadable(row.layer, row.dtype, undo)
        for variable in variables:
            if _changes(variable, row):
                undo.callback(set_variable_dtype(variable, str(row.dtype)))
    return [facts for facts, _ in done]


def _each_once(rows: list[Wanted]) -> list[tuple[Wanted, list[Any]]]:
    """Return each row with the variables that are its own.

    Those that a wrapper keeps of what it wraps, as SpectralNormalization does, belong to the inner
    layer, which made them; those that other layers share, to the first.

    Raises:
        PolicyError: If two rows want one variable in different dtypes.
    """
    owners: dict[int, Wanted] = {}
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


def _refuse_two_dtypes(variable: Any, one: Wanted, other: Wanted) -> None:
    if one.dtype != other.dtype:
        raise PolicyError(
            f'Two layers share the variable "{variable.path}" and want it in different dtypes.',
            received=" and ".join(
                f'"{row.path}" in {row.dtype or "the one that it has"}' for row in (one, other)
            ),
            expected="one dtype for both",
            fix="Give both layers the same rule.",
        )


def _changes(variable: Any, row: Wanted) -> bool:
    return row.dtype is not None and takes_dtype(variable, row.dtype)


def _checked(row: Wanted, variables: list[Any]) -> tuple[Narrowed, list[tuple[Wanted, Any, float]]]:
    """Return what will become of a layer's variables, and those that do not fit."""
    facts, problems = Narrowed(row.path, 0, 0, 0, 0.0), []
    for variable, before, rounding in _roundings(row, variables):
        facts = Narrowed(
            row.path,
            facts.bytes_before + before,
            facts.bytes_after + rounding.bytes_after,
            facts.zeros + rounding.zeros,
            max(facts.error, rounding.error),
        )
        if rounding.largest:
            problems.append((row, variable, rounding.largest))
    return facts, problems


def _roundings(row: Wanted, variables: list[Any]) -> Iterator[tuple[Any, int, _Rounding]]:
    """Yield each variable with its size and what rounding does to it; one is in memory at a time.

    NumPy rounds as the frameworks do.
    """
    for variable in variables:
        values = _values(variable)
        stays = _Rounding(values.nbytes, 0, 0.0, 0.0)
        changes = _changes(variable, row)
        yield variable, values.nbytes, _rounding(values, str(row.dtype)) if changes else stays


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


def _refuse_infinities(problems: Iterable[tuple[Wanted, Any, float]]) -> None:
    found = list(problems)
    if not found:
        return
    said = [f'"{v.path}" of "{row.path}" up to {size:.6g}' for row, v, size in found[:_NAMED]]
    more = f", and {len(found) - _NAMED} variables more" if len(found) > _NAMED else ""
    dtype = found[0][0].dtype
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
