"""Saved states of the optimizer: which variable each value belongs to, and what fits."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from kerasmp.errors import ArgumentTypeError, LossScaleError, LossScaleWarning
from kerasmp.loss_scale import FixedLossScale, validation
from kerasmp.optimizer.arguments import listed
from kerasmp.optimizer.counters import COUNTERS
from kerasmp.optimizer.fused import LARGEST_SCALE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kerasmp.loss_scale import LossScale
    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer

Assignments = list[tuple[Any, Any]]

# Our own variables begin with stock Keras's, in its order: iteration, learning_rate, step_counter,
# dynamic_scale. Its lists, its numbered files and its TensorFlow checkpoints go by that order.
STOCK_OWN = 4

# Saved beside our own variables, so that a state whose other half does not fit is seen at once.
INNER_SIZES = "inner_sizes"


def sizes(variables: Sequence[Any]) -> Any:
    """Return the number of values in each variable."""
    return np.array([np.prod(v.shape, dtype="int64") for v in variables], "int64")


def save(optimizer: LossScaleOptimizer, store: Any) -> None:
    """Write the optimizer's own state by name; that of the inner one is saved beside it."""
    for variable in optimizer.own_variables:
        value = ops.convert_to_numpy(variable)
        if variable.name == "counts":  # by name too: a later version may count more
            for name, count in zip(COUNTERS, value, strict=True):
                store[name] = count
        else:
            store[variable.name] = value
    store[INNER_SIZES] = sizes(optimizer.inner_optimizer.variables)


def assign(optimizer: LossScaleOptimizer, assignments: Assignments) -> None:
    """Give variables their values, and bring a scale that lies outside the bounds inside."""
    for variable, value in assignments:
        if variable is optimizer.scale_variable:
            bounded = optimizer.schedule.bounded(value)
            _refuse_too_large(optimizer, float(ops.convert_to_numpy(bounded)))
    given = {id(variable) for variable, _ in assignments}
    schedule, parts = optimizer.schedule, optimizer.schedule_variables()
    if id(optimizer.scale_variable) in given:  # from a schedule that may have known less than ours
        initial = schedule.init()
        for key, variable in parts.items():
            if id(variable) not in given:
                variable.assign(initial[key])
    for variable, value in assignments:
        variable.assign(value)
    scale = float(ops.convert_to_numpy(optimizer.scale_variable))
    optimizer.scale_variable.assign(
        schedule.bounded(schedule.initial_scale if np.isnan(scale) else scale)
    )


def _refuse_too_large(optimizer: LossScaleOptimizer, scale: float) -> None:
    """Raise if a scale is too large for fused updates, whose rate is divided by it."""
    if optimizer.fused_update is not None and scale > LARGEST_SCALE:
        raise LossScaleError(
            "Fused updates would lose gradients of so large a scale.",
            received=f"loss_scale = {scale!r}",
            expected=f"at most {LARGEST_SCALE!r}",
            fix="Make the optimizer with fused=False.",
        )


def start_anew(optimizer: LossScaleOptimizer, scale: float) -> None:
    """Let the schedule of a built optimizer begin again at a scale within its bounds."""
    number = optimizer.schedule.check(scale)
    if not optimizer.built:
        raise LossScaleError(
            "The optimizer has no state yet.",
            received=f"loss_scale = {scale!r}",
            expected="a built optimizer",
            fix="Pass loss_scale= to the constructor, or call build(variables) first.",
        )
    _refuse_too_large(optimizer, number)
    first = optimizer.schedule.init() | {"scale": number}
    for key, variable in optimizer.schedule_variables().items():
        variable.assign(first[key])


def configuration(given: Any) -> dict[str, Any]:
    """Return what `get_config` returned as a dict that may be changed.

    Raises:
        ArgumentTypeError: If it is no dict.
        LossScaleError: If it names no inner optimizer.
    """
    config = validation.mapping("The configuration", given)
    if "inner_optimizer" not in config:
        raise LossScaleError(
            "The configuration names no inner optimizer.",
            received=f"the keys {sorted(map(str, config))}",
            expected='what get_config() returns, with "inner_optimizer"',
            fix="LossScaleOptimizer(optimizer) wraps one.",
        )
    return config


def schedule_now(optimizer: LossScaleOptimizer) -> LossScale:
    """Return the schedule; a fixed one of the scale that it was set to by hand."""
    schedule = optimizer.schedule
    if not isinstance(schedule, FixedLossScale) or not optimizer.built:
        return schedule
    try:
        scale = schedule.check(float(ops.convert_to_numpy(optimizer.scale_variable)))
    except Exception:  # noqa: BLE001 - no number in a trace, nor on JAX in `fit`; or a broken one
        return schedule
    return dataclasses.replace(schedule, scale=scale)


def set_list(optimizer: LossScaleOptimizer, weights: Sequence[Any]) -> None:
    """See `LossScaleOptimizer.set_weights`."""
    weights = listed("weights", weights)
    if not optimizer.built:
        raise LossScaleError(
            "`weights` cannot be set yet, the optimizer is not built.",
            received=f"{len(weights)} values",
            expected="a built optimizer",
            fix="Call build(model.trainable_variables) first.",
        )
    assign(optimizer, in_list(optimizer, weights, "`weights`"))


def load(optimizer: LossScaleOptimizer, store: Any) -> bool:
    """Read a saved state; see `LossScaleOptimizer.load_own_variables`.

    Returns:
        Whether the inner optimizer has its state already, or must not get one.

    Raises:
        ArgumentTypeError: If it is no store.
    """
    if not hasattr(store, "keys"):
        raise ArgumentTypeError(
            "`store` holds no values by name.",
            received=f"{store!r} of type {type(store).__name__}",
            expected="a dict, or what Keras's loader passes",
            fix="save_own_variables(store) fills one.",
        )
    try:
        if optimizer.built:
            assign(optimizer, in_file(optimizer, store))
            return "0" in store
        if "dynamic_scale" not in store and "0" not in store:
            return False
        why = "The optimizer is not built. Call build(model.trainable_variables) first."
    except LossScaleError as error:
        why = str(error)
    warnings.warn(
        f"The saved state of '{optimizer.name}' is left out. {why}", LossScaleWarning, stacklevel=4
    )
    return True


def in_file(optimizer: LossScaleOptimizer, store: Mapping[str, Any]) -> Assignments:
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


def in_list(optimizer: LossScaleOptimizer, values: Sequence[Any], what: str) -> Assignments:
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
        # ml_dtypes's kind is V.
        kinds = "iu" if "int" in str(variable.dtype) else "biufV"
        if value.shape != tuple(variable.shape) or value.dtype.kind not in kinds:
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
