"""What the wrapped optimizer remembers: the scale, the counters, and how they are saved."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from kerasmp import backend
from kerasmp.backend.keras_private import weights_and_averages
from kerasmp.errors import LossScaleError, LossScaleWarning
from kerasmp.optimizer.causes import CAUSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.loss_scale import LossScale

# Keras's own names for the state of a schedule; other keys keep theirs.
_VARIABLE_NAMES = {"scale": "dynamic_scale"}
# One variable holds all counters: a step that is fine then writes one and not three.
COUNTERS = ("applied_steps", "skipped_steps", "consecutive_skips", *CAUSES)

# Where stock Keras's files, which number variables instead of naming them, hold the same state.
_STOCK_PLACES = {"step_counter": "2", "dynamic_scale": "3"}


class ScalingState(keras.optimizers.LossScaleOptimizer):
    """The state of `LossScaleOptimizer`, which says what each part is.

    Attributes:
        schedule: The `LossScale` in use.
        inner_optimizer: The wrapped optimizer.
    """

    schedule: LossScale
    inner_optimizer: Any

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the scaling state and build the inner optimizer; later calls do nothing.

        Args:
            var_list: The trainable variables, in the order of the gradients.
        """
        if self.built:
            return
        with keras.name_scope(self.name):
            for key, value in self.schedule.init().items():
                name = _VARIABLE_NAMES.get(key, key)
                dtype = "float32" if isinstance(value, float) else "int"
                setattr(self, name, self._scalar(name, dtype, value))
            self.counts_variable = self.add_variable(
                shape=(len(COUNTERS),), dtype="int", initializer="zeros", name="counts"
            )
            self.nonfinite_counts_variable = self.add_variable(
                shape=(len(var_list),), dtype="int", initializer="zeros", name="nonfinite_counts"
            )
            if not self.inner_optimizer.built:
                self.inner_optimizer.build(var_list)
                # Keras's averages begin as zeros and take the weights at the first update. Until
                # then, if steps are skipped, SwapEMAWeights would put zeros into the model.
                for variable, average in weights_and_averages(self.inner_optimizer):
                    backend.current().start_as(average, variable)
        keras.optimizers.Optimizer.build(self, var_list)

    def _scalar(self, name: str, dtype: str, value: float) -> Any:
        initializer = keras.initializers.Constant(value)
        return self.add_variable(shape=(), dtype=dtype, initializer=initializer, name=name)

    def _schedule_variables(self) -> dict[str, Any]:
        return {key: getattr(self, _VARIABLE_NAMES.get(key, key)) for key in self.schedule.init()}

    def _read(self, name: str) -> Any:
        """Return the value of an own variable as a NumPy array."""
        return ops.convert_to_numpy(getattr(self, name).value)

    @property
    def loss_scale(self) -> float:
        """The current scale; reading it waits for the device, use `dynamic_scale` in a step.

        Settable, within the schedule's bounds; the step counter then starts again.
        """
        return float(self._read("dynamic_scale")) if self.built else self.schedule.initial_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        number = self.schedule.check(value)
        if not self.built:
            raise LossScaleError(
                "The optimizer has no state yet.",
                received=f"loss_scale = {value!r}",
                expected="a built optimizer",
                fix="Pass loss_scale= to the constructor, or call build(variables) first.",
            )
        self.dynamic_scale.assign(number)
        self.step_counter.assign(0)

    scale = loss_scale

    def _count(self, name: str) -> int:
        return int(self._read("counts_variable")[COUNTERS.index(name)]) if self.built else 0

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite."""
        return self._count("skipped_steps")

    @property
    def consecutive_skips(self) -> int:
        """Steps skipped in a row up to now."""
        return self._count("consecutive_skips")

    @property
    def applied_steps(self) -> int:
        """Steps whose gradients reached the inner optimizer."""
        return self._count("applied_steps")

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped."""
        return self.consecutive_skips > 0

    def skipped_last(self) -> Any:
        """Return `last_step_skipped` as a scalar bool tensor, without waiting for the device."""
        return skipped_last(self.counts_variable)

    @property
    def nonfinite_counts(self) -> Any:
        """For each trainable variable, in how many steps its gradient was not finite.

        Returns:
            Integer NumPy array, shape `(number of trainable variables,)`; empty before `build`.
        """
        return self._read("nonfinite_counts_variable") if self.built else np.zeros(0, "int64")

    @property
    def skip_causes(self) -> dict[str, int]:
        """How many steps were skipped for each cause: "loss", "gradients", "floor", "unknown".

        "loss": the loss itself was inf or NaN, no scale helps, and the scale was not lowered.
        "gradients": the loss was finite, gradients were not; the scale was presumed too high.
        "floor": the same where the scale can sink no further. "unknown": `apply` did not see the
        loss (with a stock `keras.Model` on JAX it cannot), and treated it as "gradients".
        """
        return {cause: self._count(cause) for cause in CAUSES}

    @property
    def target_variables(self) -> list[Any]:
        """The variables that it was built with, in the order of `nonfinite_counts`."""
        return list(self._trainable_variables)

    @property
    def initial_scale(self) -> float:
        """The schedule's first scale."""
        return self.schedule.initial_scale

    @property
    def dynamic_growth_steps(self) -> int | None:
        """The schedule's growth interval; None for a scale that does not grow."""
        return getattr(self.schedule, "growth_interval", None)

    def save_own_variables(self, store: Any) -> None:
        """Write the scaling state by name; the inner optimizer's is saved beside it."""
        for variable in self._variables:
            store[variable.name] = ops.convert_to_numpy(variable.value)

    def load_own_variables(self, store: Any) -> None:
        """Read the scaling state: ours by name, stock Keras's by position.

        A scale outside the schedule's bounds is brought inside. A plain optimizer's state goes to
        the inner optimizer (about which Keras then warns, for it finds nothing in the usual place).
        """
        if not self.built:
            if "dynamic_scale" in store or "2" in store:
                warnings.warn(
                    f"The saved state of '{self.name}' is left out, the optimizer is not built. "
                    "Call build(model.trainable_variables) first.",
                    LossScaleWarning,
                    stacklevel=2,
                )
            return
        by_name = {variable.name: variable for variable in self._variables}
        if "0" not in store:
            places = {name: name for name in by_name}
        elif _is_of_stock_wrapper(store):
            places = _STOCK_PLACES
        else:
            self.inner_optimizer.load_own_variables(store)
            return
        for name, place in places.items():
            if place in store:
                by_name[name].assign(np.asarray(store[place]))
        scale = self.loss_scale
        if np.isnan(scale):
            scale = self.schedule.initial_scale
        self.dynamic_scale.assign(min(max(scale, self.schedule.min_scale), self.schedule.max_scale))

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all of `variables`, the inner optimizer's too."""
        if len(weights) != len(self.variables):
            raise LossScaleError(
                "`weights` does not match the optimizer's variables.",
                received=f"{len(weights)} values",
                expected=f"{len(self.variables)}",
                fix="Build the optimizer first, and pass the values of optimizer.variables.",
            )
        for variable, value in zip(self.variables, weights, strict=True):
            variable.assign(value)


def counted(counts: Any, cause: Any) -> Any:
    """Return the counters after a step.

    Args:
        counts: Integer vector over `COUNTERS`.
        cause: None if the step was applied, else a position in `CAUSES`.
    """
    counts = ops.convert_to_tensor(counts)
    if cause is None:
        keep = [name != "consecutive_skips" for name in COUNTERS]
        add = [name == "applied_steps" for name in COUNTERS]
        return counts * ops.cast(keep, counts.dtype) + ops.cast(add, counts.dtype)
    place = ops.arange(len(COUNTERS))
    skip = ops.logical_or(
        place == COUNTERS.index("skipped_steps"), place == COUNTERS.index("consecutive_skips")
    )
    hit = place == ops.cast(cause, place.dtype) + COUNTERS.index(CAUSES[0])
    return counts + ops.cast(ops.logical_or(skip, hit), counts.dtype)


def skipped_last(counts: Any) -> Any:
    """Return whether `counts`, a vector over `COUNTERS`, say that the last step was skipped."""
    return ops.convert_to_tensor(counts)[COUNTERS.index("consecutive_skips")] > 0


def _is_of_stock_wrapper(store: Any) -> bool:
    # What stands there in a plain optimizer's file belongs to a weight, and is no integer.
    counter = np.asarray(store["2"]) if "2" in store else np.zeros(1)
    return counter.shape == () and np.issubdtype(counter.dtype, np.integer)
