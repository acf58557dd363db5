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
from kerasmp.optimizer import saved
from kerasmp.optimizer.causes import CAUSES
from kerasmp.optimizer.counters import COUNTERS, consecutive_skips, skipped_in_all, skipped_last

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kerasmp.loss_scale import LossScale

# Keras's own names for the state of a schedule; other keys keep theirs.
_VARIABLE_NAMES = {"scale": "dynamic_scale"}
_STOCK_ORDER = ("step_counter", "scale")


class ScalingState(keras.optimizers.LossScaleOptimizer):
    """The state of `LossScaleOptimizer`, which says what each part is.

    Attributes:
        schedule: The `LossScale` in use.
        inner_optimizer: The wrapped optimizer.
    """

    schedule: LossScale
    inner_optimizer: Any
    _inner_is_settled = False

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the scaling state and build the inner optimizer; later calls do nothing.

        Args:
            var_list: The trainable variables, in the order of the gradients.
        """
        if self.built:
            return
        with keras.name_scope(self.name):
            # TensorFlow's checkpoints go by position too: what stock Keras has comes first, in its
            # order, and what depends on the schedule last.
            state = self.schedule.init()
            for key in _STOCK_ORDER:
                self._add_to_state(key, state.pop(key))
            self.counts_variable = self.add_variable(
                shape=(len(COUNTERS),), dtype="int", initializer="zeros", name="counts"
            )
            self.nonfinite_counts_variable = self.add_variable(
                shape=(len(var_list),), dtype="int", initializer="zeros", name="nonfinite_counts"
            )
            for key, value in state.items():
                self._add_to_state(key, value)
            if not self.inner_optimizer.built:
                self.inner_optimizer.build(var_list)
            # Keras's averages begin as zeros and take the weights at the first update. Until then,
            # if steps are skipped, SwapEMAWeights would put zeros into the model.
            for variable, average in weights_and_averages(self.inner_optimizer):
                backend.current().start_as(average, variable)
        keras.optimizers.Optimizer.build(self, var_list)

    def _add_to_state(self, key: str, value: float) -> None:
        name = _VARIABLE_NAMES.get(key, key)
        dtype = "float32" if isinstance(value, float) else "int"
        setattr(self, name, self._scalar(name, dtype, value))

    def _scalar(self, name: str, dtype: str, value: float) -> Any:
        initializer = keras.initializers.Constant(value)
        return self.add_variable(shape=(), dtype=dtype, initializer=initializer, name=name)

    def _schedule_variables(self) -> dict[str, Any]:
        return {key: getattr(self, _VARIABLE_NAMES.get(key, key)) for key in self.schedule.init()}

    def _read(self, name: str) -> Any:
        """Return the value of an own variable as a NumPy array."""
        # Not its `value`, which in the scope of a strategy is one for each replica.
        return ops.convert_to_numpy(getattr(self, name))

    @property
    def loss_scale(self) -> float:
        """The current scale; reading it waits for the device, use `dynamic_scale` in a step.

        Settable, within the schedule's bounds; the schedule then starts anew from there.
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
        self._start_anew(self._schedule_variables().keys() - {"scale"})
        self.dynamic_scale.assign(number)

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
        return int(consecutive_skips(self._read("counts_variable"))) if self.built else 0

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

    def skips(self) -> Any:
        """Return `skipped_steps` as a scalar integer tensor, or None before `build`."""
        return skipped_in_all(self.counts_variable) if self.built else None

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
        counts = self._read("counts_variable").tolist() if self.built else [0] * len(COUNTERS)
        return {cause: counts[COUNTERS.index(cause)] for cause in CAUSES}

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

    @property
    def own_variables(self) -> list[Any]:
        """The variables beside the inner optimizer's; `variables` holds both."""
        return list(self._variables)

    def __dir__(self) -> list[str]:
        """Return the names of all attributes.

        Keras's loader looks for what is left to load with `dir`, right after it has called
        `load_own_variables`; there it must not find an inner optimizer that has its state already.
        """
        names = list(super().__dir__())
        if self._inner_is_settled:
            self._inner_is_settled = False
            names.remove("inner_optimizer")
        return names

    def save_own_variables(self, store: Any) -> None:
        """Write the scaling state by name; the inner optimizer's is saved beside it."""
        self._inner_is_settled = False
        for variable in self._variables:
            value = ops.convert_to_numpy(variable)
            if variable.name == "counts":  # by name too: a later version may count more
                for name, count in zip(COUNTERS, value, strict=True):
                    store[name] = count
            else:
                store[variable.name] = value
        store[saved.INNER_SIZES] = saved.sizes(self.inner_optimizer.variables)

    def load_own_variables(self, store: Any) -> None:
        """Read the scaling state: ours, stock Keras's, or a plain optimizer's for the inner one.

        A scale outside the schedule's bounds is brought inside. A state that does not fit changes
        nothing, in the inner optimizer neither, and earns a `LossScaleWarning`.
        """
        self._inner_is_settled = False
        if not self.built:
            if "dynamic_scale" in store or "0" in store:
                self._leave_out(
                    "The optimizer is not built. Call build(model.trainable_variables) first."
                )
            return
        try:
            assignments = saved.in_file(self, store)
        except LossScaleError as error:
            self._leave_out(str(error))
            return
        self._assign(assignments)
        self._inner_is_settled = "0" in store

    def _leave_out(self, why: str) -> None:
        self._inner_is_settled = True
        warnings.warn(
            f"The saved state of '{self.name}' is left out. {why}", LossScaleWarning, stacklevel=4
        )

    def _start_anew(self, keys: Collection[str]) -> None:
        """Give these parts of the schedule's state the values that they begin with."""
        initial = self.schedule.init()
        variables = self._schedule_variables()
        for key in keys:
            variables[key].assign(initial[key])

    def _assign(self, assignments: saved.Assignments) -> None:
        given = {id(variable) for variable, _ in assignments}
        if id(self.dynamic_scale) in given:  # from a schedule that may have known less than ours
            variables = self._schedule_variables().items()
            self._start_anew([key for key, variable in variables if id(variable) not in given])
        for variable, value in assignments:
            variable.assign(value)
        scale = self.loss_scale
        if np.isnan(scale):
            scale = self.schedule.initial_scale
        self.dynamic_scale.assign(self.schedule.bounded(scale))

    def get_weights(self) -> list[Any]:
        """Return the values of all of `variables`, the inner optimizer's too, as NumPy arrays."""
        return [ops.convert_to_numpy(variable) for variable in self.variables]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all of `variables`, the inner optimizer's too.

        Args:
            weights: What `get_weights` returned; or the values of the `variables` of stock Keras's
                LossScaleOptimizer; or those of a plain optimizer, for the inner one.

        Raises:
            LossScaleError: If the optimizer is not built, or `weights` does not fit it. Nothing
                has changed then.
        """
        if not self.built:
            raise LossScaleError(
                "`weights` cannot be set yet, the optimizer is not built.",
                received=f"{len(weights)} values",
                expected="a built optimizer",
                fix="Call build(model.trainable_variables) first.",
            )
        self._assign(saved.in_list(self, weights, "`weights`"))
