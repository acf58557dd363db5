"""Saved states of the optimizer: which variable gets each value, and whether the values fit."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from kerasmp.errors import ArgumentTypeError, LossScaleError, LossScaleWarning, with_type
from kerasmp.loss_scale import FixedLossScale, validation
from kerasmp.optimizer.counters import COUNTERS
from kerasmp.optimizer.fused import LARGEST_SCALE
from kerasmp.optimizer.step_arguments import as_list, not_built

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kerasmp.loss_scale import LossScale
    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer

Assignments = list[tuple[Any, Any]]

# The own variables begin with those of stock Keras, in its order: iteration, learning_rate,
# step_counter, dynamic_scale. Its lists, its files and its TensorFlow checkpoints depend on it.
STOCK_OWN = 4

# Saved beside the own variables, to see at once that the state of the inner optimizer, which is
# saved elsewhere, does not fit.
INNER_SIZES = "inner_sizes"


def save(optimizer: LossScaleOptimizer, store: Any) -> None:
    """Write the optimizer's own state by name. Keras saves the inner optimizer separately."""
    for variable in optimizer.own_variables:
        value = ops.convert_to_numpy(variable)
        if variable.name == "counts":  # by name too, since a later version may have more counters
            for name, count in zip(COUNTERS, value, strict=True):
                store[name] = count
        else:
            store[variable.name] = value
    store[INNER_SIZES] = _inner_sizes(optimizer)


def _inner_sizes(optimizer: LossScaleOptimizer) -> Any:
    """Return the number of values in each variable of the inner optimizer."""
    sizes = [np.prod(v.shape, dtype="int64") for v in optimizer.inner_optimizer.variables]
    return np.array(sizes, "int64")


def load(optimizer: LossScaleOptimizer, store: Any) -> bool:
    """Read a saved state; see `LossScaleOptimizer.load_own_variables`.

    Returns:
        Whether Keras must not load the inner optimizer: it has its state, or must not get one.

    Raises:
        ArgumentTypeError: If `store` is not a mapping.
    """
    if not hasattr(store, "keys"):
        raise ArgumentTypeError(
            "`store` is not a mapping from names to values.",
            received=with_type(store),
            expected="a dict, or what Keras passes when it loads a file",
            fix="save_own_variables(store) fills one.",
        )
    try:
        if optimizer.built:
            _assign(optimizer, _from_store(optimizer, store))
            return "0" in store
        if "dynamic_scale" not in store and "0" not in store:
            return False
        why = "The optimizer is not built. Call build(model.trainable_variables) first."
    except LossScaleError as error:
        why = str(error)
    warnings.warn(
        f"The saved state of '{optimizer.name}' is not loaded. {why}",
        LossScaleWarning,
        stacklevel=4,
    )
    return True


def set_weights(optimizer: LossScaleOptimizer, weights: Sequence[Any]) -> None:
    """Set all variables from a list; see `LossScaleOptimizer.set_weights`."""
    weights = as_list("weights", weights)
    if not optimizer.built:
        raise not_built("set_weights")
    _assign(optimizer, _from_list(optimizer, weights, "`weights`"))


def _from_store(optimizer: LossScaleOptimizer, store: Mapping[str, Any]) -> Assignments:
    """Return the assignments for a saved state: by name, or by number if stock Keras saved it.

    Raises:
        LossScaleError: If the state does not fit the optimizer.
    """
    what = "The saved state"
    names = list(store.keys())
    if "0" in names:
        return _from_list(optimizer, [store[str(i)] for i in range(len(names))], what)
    if "dynamic_scale" not in names:
        raise _misfit(
            what,
            "no loss scale",
            "the state of an optimizer that was built",
            "It was saved before training, or without an optimizer.",
        )
    inner = _inner_sizes(optimizer)
    saved = np.asarray(store[INNER_SIZES]) if INNER_SIZES in names else inner
    if not np.array_equal(saved, inner):
        raise _misfit(
            what,
            f"an inner optimizer with variables of {saved.tolist()} values",
            f"{inner.tolist()}",
            "Load it into the same kind of inner optimizer, for the same model.",
        )
    pairs = [(v, store[v.name]) for v in optimizer.own_variables if v.name in names]
    counts = [np.asarray(store[name]) if name in names else 0 for name in COUNTERS]
    pairs.append((optimizer.counts_variable, np.array(counts)))
    return _fitting(pairs, what)


def _from_list(optimizer: LossScaleOptimizer, values: Sequence[Any], what: str) -> Assignments:
    """Return the assignments for a list of values.

    Args:
        optimizer: A built optimizer.
        values: The values of `variables`, or of those of stock Keras's wrapper or a plain
            optimizer, in their order.
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
        plain, stock, own = sorted(kinds)
        raise _misfit(
            what,
            f"{len(values)} values",
            f"{own}, or {stock} from stock Keras's wrapper, or {plain} from a plain optimizer",
            "Take them from the same kind of inner optimizer, for the same model.",
        )
    return _fitting(list(zip(kinds[len(values)], values, strict=True)), what)


def _fitting(pairs: Assignments, what: str) -> Assignments:
    """Return the pairs with arrays as values, if each fits its variable."""
    pairs = [(variable, np.asarray(value)) for variable, value in pairs]
    for variable, value in pairs:
        # The float dtypes of ml_dtypes have the kind "V".
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


def _assign(optimizer: LossScaleOptimizer, assignments: Assignments) -> None:
    """Assign values to variables, the scale within the bounds of the schedule."""
    values = {id(variable): value for variable, value in assignments}
    schedule, scale_id = optimizer.schedule, id(optimizer.scale_variable)
    if scale_id in values:
        scale = float(values[scale_id])
        bounded = schedule.bounded(schedule.initial_scale if np.isnan(scale) else scale)
        _refuse_too_large(optimizer, float(ops.convert_to_numpy(bounded)))
        values[scale_id] = bounded
        # The saved schedule may have had a smaller state.
        initial = schedule.init()
        for key, variable in optimizer.schedule_variables().items():
            if id(variable) not in values:
                variable.assign(initial[key])
    for variable, _ in assignments:
        variable.assign(values[id(variable)])


def restart_schedule(optimizer: LossScaleOptimizer, scale: float) -> None:
    """Restart the schedule of a built optimizer at a scale within its bounds."""
    number = optimizer.schedule.check(scale)
    if not optimizer.built:
        raise LossScaleError(
            "The loss scale of an optimizer cannot be set before `build`.",
            received=f"loss_scale = {scale!r}",
            expected="a built optimizer",
            fix="Pass loss_scale= to the constructor, or call build(variables) first.",
        )
    _refuse_too_large(optimizer, number)
    first = optimizer.schedule.init() | {"scale": number}
    for key, variable in optimizer.schedule_variables().items():
        variable.assign(first[key])


def _refuse_too_large(optimizer: LossScaleOptimizer, scale: float) -> None:
    """Raise a LossScaleError if a scale is too large for the fused update of the optimizer."""
    if optimizer.fused_update is not None and scale > LARGEST_SCALE:
        raise LossScaleError(
            "The scale is too large for fused updates, which would lose gradients.",
            received=f"loss_scale = {scale!r}",
            expected=f"at most {LARGEST_SCALE!r}",
            fix="Create the optimizer with fused=False.",
        )


def current_schedule(optimizer: LossScaleOptimizer) -> LossScale:
    """Return the schedule for the configuration; a fixed one with the scale that it was set to."""
    schedule = optimizer.schedule
    if not isinstance(schedule, FixedLossScale) or not optimizer.built:
        return schedule
    try:
        scale = schedule.check(float(ops.convert_to_numpy(optimizer.scale_variable)))
    except Exception:  # noqa: BLE001 - not known in a trace, nor on JAX in `fit`; or out of bounds
        return schedule
    return dataclasses.replace(schedule, scale=scale)


def configuration(config: Any) -> dict[str, Any]:
    """Return a copy of what `get_config` returned.

    Raises:
        ArgumentTypeError: If it is not a dict.
        LossScaleError: If it has no inner optimizer.
    """
    copy = validation.mapping("The configuration", config)
    if "inner_optimizer" not in copy:
        raise LossScaleError(
            "The configuration has no inner optimizer.",
            received=f"the keys {sorted(map(str, copy))}",
            expected='what get_config() returns, with "inner_optimizer"',
            fix="To wrap an optimizer, call LossScaleOptimizer(optimizer).",
        )
    return copy
