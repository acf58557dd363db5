"""Which variable each value of a saved state belongs to: nothing here changes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kerasmp.errors import LossScaleError
from kerasmp.optimizer.counters import COUNTERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kerasmp.optimizer.state import ScalingState

Assignments = list[tuple[Any, Any]]

# Our own variables begin with stock Keras's, in its order: iteration, learning_rate, step_counter,
# dynamic_scale. Its lists, its numbered files and its TensorFlow checkpoints go by that order.
STOCK_OWN = 4

# Saved beside our own variables, so that a state whose other half does not fit is seen at once.
INNER_SIZES = "inner_sizes"


def sizes(variables: Sequence[Any]) -> Any:
    """Return the number of values in each variable."""
    return np.array([np.prod(v.shape, dtype="int64") for v in variables], "int64")


def in_file(optimizer: ScalingState, store: Mapping[str, Any]) -> Assignments:
    """Return what a saved state sets: ours by name; stock Keras's and a plain one by number.

    Args:
        optimizer: A built optimizer.
        store: The saved values.

    Raises:
        LossScaleError: If the state does not fit the optimizer.
    """
    names = list(store.keys())
    if "0" in names:
        return in_list(optimizer, [store[str(i)] for i in range(len(names))], "The saved state")
    if "dynamic_scale" not in names:
        raise _misfit(
            "The saved state",
            "no loss scale",
            "the state of an optimizer that was built",
            "It was saved before training, or without an optimizer.",
        )
    inner = sizes(optimizer.inner_optimizer.variables)
    saved = np.asarray(store[INNER_SIZES]) if INNER_SIZES in names else inner
    if not np.array_equal(saved, inner):
        raise _misfit(
            "The saved state",
            f"an inner optimizer with variables of {saved.tolist()} values",
            f"{inner.tolist()}",
            "Load it into the same kind of inner optimizer, for the same model.",
        )
    pairs = [(v, store[v.name]) for v in optimizer.own_variables if v.name in names]
    counts = [np.asarray(store[name]) if name in names else 0 for name in COUNTERS]
    pairs.append((optimizer.counts_variable, np.array(counts)))
    return _checked(pairs, "The saved state")


def in_list(optimizer: ScalingState, values: Sequence[Any], what: str) -> Assignments:
    """Return what a list sets: all of `variables`, or stock Keras's, or a plain optimizer's.

    Args:
        optimizer: A built optimizer.
        values: Arrays in the order of the variables that they were taken from.
        what: What the list is, for the message.

    Raises:
        LossScaleError: If the list does not fit the optimizer.
    """
    inner = optimizer.inner_optimizer.variables
    own = optimizer.own_variables
    kinds = {
        len(known): known for known in (inner, [*own[:STOCK_OWN], *inner], optimizer.variables)
    }
    if len(values) not in kinds:
        plain, stock, ours = sorted(kinds)
        raise _misfit(
            what,
            f"{len(values)} values",
            f"{ours}, or {stock} from stock Keras's wrapper, or {plain} from a plain optimizer",
            "Take them from the same kind of inner optimizer, for the same model.",
        )
    return _checked(list(zip(kinds[len(values)], values, strict=True)), what)


def _checked(pairs: Assignments, what: str) -> Assignments:
    pairs = [(variable, np.asarray(value)) for variable, value in pairs]
    for variable, value in pairs:
        whole = "int" in str(variable.dtype)
        if value.shape != tuple(variable.shape) or (whole and value.dtype.kind not in "iu"):
            raise _misfit(
                what,
                f"{value.dtype} of shape {value.shape} for {variable.path}",
                f"{variable.dtype} of shape {tuple(variable.shape)}",
                "It belongs to another optimizer or another model.",
            )
    return pairs


def _misfit(what: str, received: str, expected: str, fix: str) -> LossScaleError:
    return LossScaleError(
        f"{what} does not fit the optimizer's variables, and nothing has changed.",
        received=received,
        expected=expected,
        fix=fix,
    )
