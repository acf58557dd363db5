"""The variables that the wrapped optimizer adds when it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.nested import optimizer_chain
from kerasmp.backend.optimizer_internals import weights_and_averages
from kerasmp.optimizer.counters import COUNTERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer

# Keras's names for parts of a schedule's state. Other variables are named like their keys.
_VARIABLE_NAMES = {"scale": "dynamic_scale"}
_STOCK_ORDER = ("step_counter", "scale")


def add_variables(optimizer: LossScaleOptimizer, variables: Sequence[Any]) -> None:
    """Add the scaling state to an optimizer, and build its inner optimizer.

    Args:
        optimizer: The optimizer.
        variables: The trainable variables.
    """
    inner, framework = optimizer.inner_optimizer, backend.current()
    framework.all_reduce_once(optimizer_chain(inner))
    with keras.name_scope(optimizer.name):
        # TensorFlow's checkpoints depend on the order of variables: those of stock Keras come
        # first, in its order, and those that depend on the schedule last.
        state = optimizer.schedule.init()
        for key in _STOCK_ORDER:
            _add_state(optimizer, key, state.pop(key))
        optimizer.counts_variable = optimizer.add_variable(
            shape=(len(COUNTERS),), dtype="int", initializer="zeros", name="counts"
        )
        optimizer.nonfinite_counts_variable = optimizer.add_variable(
            shape=(len(variables),), dtype="int", initializer="zeros", name="nonfinite_counts"
        )
        for key, value in state.items():
            _add_state(optimizer, key, value)
        if not inner.built:
            inner.build(variables)
        # Keras's averages are zeros until the first update, which copies the weights to them. If
        # the first steps are skipped, SwapEMAWeights would put these zeros into the model.
        for variable, average in weights_and_averages(inner):
            framework.initialize_from(average, variable)


def _add_state(optimizer: LossScaleOptimizer, key: str, value: float) -> None:
    name = _VARIABLE_NAMES.get(key, key)
    dtype = "float32" if isinstance(value, float) else "int"
    first = keras.initializers.Constant(value)
    variable = optimizer.add_variable(shape=(), dtype=dtype, initializer=first, name=name)
    setattr(optimizer, name, variable)
