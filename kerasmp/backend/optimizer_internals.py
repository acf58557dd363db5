"""Private attributes of Keras's optimizers, each use with its reason.

`tests/backend/test_optimizer_internals.py` fails if one of them moves. It also covers the private
attributes that kerasmp's subclasses inherit and read on themselves, where no other package could:
`_trainable_variables`, `_variables`, `_get_variable_index` and `_check_variables_are_known` of
`keras.optimizers.Optimizer`, for which there is no public reader.
"""

from __future__ import annotations

import contextlib
import operator
from typing import TYPE_CHECKING, Any

import keras
from keras.optimizers.schedules import LearningRateSchedule

from kerasmp.backend.nested import optimizer_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def is_built_with(optimizer: Any, variables: Sequence[Any]) -> bool:
    """Return whether these are the variables that an optimizer was built with, in that order.

    Publicly, each variable is looked up by itself.
    """
    own = optimizer._trainable_variables  # noqa: SLF001 - see the docstrings, here and below
    return len(variables) == len(own) and all(map(operator.is_, variables, own))


def moments(optimizer: Any, variables: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return the moments that a built Adam, AdamW or SGD keeps of each variable: two, one or none.

    Publicly, there is one list of all the variables that an optimizer holds.
    """
    both: list[list[Any]] = (
        [optimizer.momentums]
        if isinstance(optimizer, keras.optimizers.SGD)
        else [optimizer._momentums, optimizer._velocities]  # noqa: SLF001
    )
    lists = [each for each in both if each]
    if not lists:
        return [()] * len(variables)
    if not is_built_with(optimizer, variables):
        indices = [optimizer._get_variable_index(v) for v in variables]  # noqa: SLF001
        lists = [[each[index] for index in indices] for each in lists]
    return list(zip(*lists, strict=True))


def weights_and_averages(optimizer: Any) -> list[tuple[Any, Any]]:
    """Return (variable, average) pairs of a built optimizer whose `use_ema` is set.

    Publicly, neither the averages nor the variables that they belong to can be reached.
    """
    return [
        (variable, average)
        for inner in optimizer_chain(optimizer)
        if inner.use_ema and inner.built
        for variable, average in zip(
            inner._trainable_variables,  # noqa: SLF001
            inner._model_variables_moving_average,  # noqa: SLF001
            strict=True,
        )
        if average is not None
    ]


def optimizer_state_in_fit(model: Any) -> list[tuple[Any, Any]]:
    """Return (variable, value) pairs of the optimizer's state that `fit` on JAX passes around.

    Empty if the variables hold their values themselves. The public `jax_state_sync` updates the
    variables of the whole model.
    """
    state = getattr(model, "_jax_state", None)
    if not state or model._jax_state_synced:  # noqa: SLF001
        return []
    return list(zip(model.optimizer.variables, state["optimizer_variables"], strict=True))


def step_count(optimizer: Any) -> int:
    """Return how many steps a built optimizer has applied.

    The public `iterations` counts windows of accumulated gradients.
    """
    return int(keras.ops.convert_to_numpy(optimizer._iterations))  # noqa: SLF001


def applies_weight_decay(optimizer: Any, variable: Any) -> bool:
    """Return whether an optimizer has a weight decay and does not exclude a variable from it.

    Publicly, variables can be excluded, but not read.
    """
    return optimizer.weight_decay is not None and bool(optimizer._use_weight_decay(variable))  # noqa: SLF001


def _learning_rates(optimizer: Any) -> list[tuple[Any, Any]]:
    """Return (optimizer, learning rate) pairs for an optimizer and those inside it.

    The public `learning_rate` returns only the present number of a schedule or a function.
    """
    return [(inner, inner._learning_rate) for inner in optimizer_chain(optimizer)]  # noqa: SLF001


def learning_rate_numbers(optimizer: Any) -> list[float]:
    """Return the learning rates that are numbers, except in a trace, where they cannot be read."""
    found = []
    for _, rate in _learning_rates(optimizer):
        if isinstance(rate, keras.Variable):
            with contextlib.suppress(Exception):  # each framework has its own error in a trace
                found.append(float(keras.ops.convert_to_numpy(rate)))
    return found


def learning_rate_schedules(optimizer: Any) -> list[tuple[Any, Any]]:
    """Return (optimizer, learning-rate schedule) pairs for an optimizer and those inside it."""
    return [
        (inner, rate)
        for inner, rate in _learning_rates(optimizer)
        if isinstance(rate, LearningRateSchedule)
    ]


def learning_rate_functions(optimizer: Any) -> list[tuple[Any, Any]]:
    """Return (optimizer, function) pairs for those whose learning rate is a plain function."""
    return [
        (inner, rate)
        for inner, rate in _learning_rates(optimizer)
        if callable(rate) and not isinstance(rate, LearningRateSchedule)
    ]


@contextlib.contextmanager
def restore_on_error(optimizers: Sequence[Any]) -> Iterator[None]:
    """Remove everything that building optimizers has created if the building fails."""
    undo = undo_building(optimizers)
    try:
        yield
    except BaseException:  # includes an interrupt
        undo()
        raise


def undo_building(optimizers: Sequence[Any]) -> Callable[[], None]:
    """Return a function that removes everything that optimizers create from now on.

    Publicly, variables can be added to an optimizer, but not removed.
    """
    before = [
        (each, dict(vars(each)), len(each._variables), dict(each._trainable_variables_indices))  # noqa: SLF001
        for each in optimizers
    ]

    def undo() -> None:
        for each, attributes, number, indices in before:
            for variable in each._variables[number:]:  # noqa: SLF001
                each._untrack_variable(variable)  # noqa: SLF001
            for name in vars(each).keys() - attributes.keys():
                del vars(each)[name]
            vars(each).update(attributes)
            each._trainable_variables_indices.clear()  # noqa: SLF001
            each._trainable_variables_indices.update(indices)  # noqa: SLF001

    return undo
