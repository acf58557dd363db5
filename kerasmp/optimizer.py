"""The wrapped optimizer: scales the loss, unscales and checks the gradients, updates or skips."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from kerasmp import backend
from kerasmp.errors import ArgumentTypeError, LossScaleError, LossScaleWarning
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale, resolve

# Keras's own names for the state of a schedule; other keys keep theirs.
_VARIABLE_NAMES = {"scale": "dynamic_scale"}
_COUNTERS = ("applied_steps", "skipped_steps", "consecutive_skips")

# Where stock Keras's files, which number variables instead of naming them, hold the same state.
_STOCK_PLACES = {"step_counter": "2", "dynamic_scale": "3"}

# What older files hold in the wrapper's config although it never had an effect there.
_INNER_ARGUMENTS = {
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}


@keras.saving.register_keras_serializable(package="kerasmp")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Wraps an optimizer: the loss is scaled, the gradients are unscaled, bad steps are skipped.

    Each step: gradients of the scaled loss are checked for inf and NaN, all replicas agree, and
    then either the gradients are unscaled in float32 and handed to the inner optimizer, or the
    step is skipped: no weight, no slot and no `iterations` change. The schedule then moves the
    scale. Everything is counted on the device.

    It is a `keras.optimizers.LossScaleOptimizer`, so `compile` does not wrap it a second time.

    Args:
        inner_optimizer: A Keras optimizer or its name, such as "adam".
        loss_scale: "dynamic" (default; `DynamicLossScale()`), "fixed" (`FixedLossScale()`, 2**15),
            a positive number (fixed), a `LossScale`, or None (scale 1, check and skip).
        dynamic: As in Keras 2: False means a fixed scale, True a dynamic one.
        initial_scale: As in Keras 2 and 3: the first scale of the dynamic schedule, or with
            `dynamic=False` the fixed one.
        dynamic_growth_steps: As in Keras 2 and 3: `growth_interval` of the dynamic schedule.
        name: Name of the optimizer.
        **kwargs: Refused, with a word on where each belongs.

    Attributes:
        schedule: The `LossScale` in use.
        inner_optimizer: The wrapped optimizer.
        dynamic_scale: float32 scalar variable, the current scale (after `build`).
        step_counter: Integer scalar variable, good steps since the scale last moved.

    Raises:
        LossScaleError: For a scale or schedule that cannot work, for an inner optimizer that
            scales already, and for arguments that belong to the inner optimizer.
        ArgumentTypeError: If `inner_optimizer` is no optimizer.

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740.

    Example:

    >>> optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=1024)
    >>> weight = keras.Variable([1.0, 2.0])
    >>> optimizer.apply([ops.array([1024.0, 2048.0])], [weight])
    >>> ops.convert_to_numpy(weight).tolist()
    [0.5, 1.0]
    >>> optimizer.apply([ops.array([float("inf"), 0.0])], [weight])
    >>> ops.convert_to_numpy(weight).tolist(), optimizer.skipped_steps
    ([0.5, 1.0], 1)
    """

    def __init__(
        self,
        inner_optimizer: Any,
        *,
        loss_scale: Any = "dynamic",
        dynamic: bool | None = None,
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse(kwargs)
        inner_optimizer = _inner(inner_optimizer)
        schedule = _schedule(loss_scale, dynamic, initial_scale, dynamic_growth_steps)
        # Not the parent's: it would set up its own rule, whose factors are hard-coded.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.schedule = schedule
        if inner_optimizer.loss_scale_factor is not None:
            warnings.warn(
                f"The inner optimizer's loss_scale_factor={inner_optimizer.loss_scale_factor} is "
                "dropped, the gradients would be scaled twice. For a fixed scale pass "
                f"loss_scale={inner_optimizer.loss_scale_factor} here.",
                LossScaleWarning,
                stacklevel=2,
            )
            inner_optimizer.loss_scale_factor = None

    # ---------------------------------------------------------------- state

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
            for name in _COUNTERS:
                setattr(self, f"{name}_variable", self._scalar(name, "int", 0))
            self.nonfinite_counts_variable = self.add_variable(
                shape=(len(var_list),), dtype="int", initializer="zeros", name="nonfinite_counts"
            )
            if not self.inner_optimizer.built:
                self.inner_optimizer.build(var_list)
        keras.optimizers.Optimizer.build(self, var_list)

    def _scalar(self, name: str, dtype: str, value: float) -> Any:
        initializer = keras.initializers.Constant(value)
        return self.add_variable(shape=(), dtype=dtype, initializer=initializer, name=name)

    def _schedule_variables(self) -> dict[str, Any]:
        return {key: getattr(self, _VARIABLE_NAMES.get(key, key)) for key in self.schedule.init()}

    def _read(self, name: str) -> Any:
        """Return the value of an own variable as a NumPy array; zeros before `build`."""
        return ops.convert_to_numpy(getattr(self, name).value) if self.built else np.zeros((), "int64")

    @property
    def loss_scale(self) -> float:
        """The current scale. Reading it waits for the device; within a step use `dynamic_scale`.

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
                fix="Pass loss_scale= to the constructor, or call build(trainable_variables) first.",
            )
        self.dynamic_scale.assign(number)
        self.step_counter.assign(0)

    scale = loss_scale

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite."""
        return int(self._read("skipped_steps_variable"))

    @property
    def consecutive_skips(self) -> int:
        """Steps skipped in a row up to now."""
        return int(self._read("consecutive_skips_variable"))

    @property
    def applied_steps(self) -> int:
        """Steps whose gradients reached the inner optimizer."""
        return int(self._read("applied_steps_variable"))

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped."""
        return self.consecutive_skips > 0

    @property
    def nonfinite_counts(self) -> Any:
        """For each trainable variable, in how many steps its gradient was not finite.

        Returns:
            Integer NumPy array, shape `(number of trainable variables,)`; empty before `build`.
        """
        return self._read("nonfinite_counts_variable") if self.built else np.zeros(0, "int64")

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

    # ---------------------------------------------------------------- a step

    def scale_loss(self, loss: Any) -> Any:
        """Return `loss` times the current scale, in float32.

        Args:
            loss: Scalar or tensor of any shape; a float16 loss is cast first, since scaling it in
                float16 would overflow at 2 with the default scale.
        """
        scale = self.dynamic_scale if self.built else self.schedule.initial_scale
        return ops.multiply(ops.cast(loss, "float32"), scale)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Check, unscale and apply the gradients of the scaled loss, or skip the step.

        Args:
            grads: Gradients of the scaled loss; None for a variable without one.
            trainable_variables: The variables that `grads` belong to; may be left out after
                `build`.

        Raises:
            LossScaleError: If numbers of gradients and variables differ, or variables are missing.
        """
        grads = list(grads)
        if not grads:
            return
        variables = self._variables_of(grads, trainable_variables)
        if keras.backend.backend() == "jax":
            # JAX branches only in pure code, so the eager step is the pure one, then assigned.
            touched = [*self._trainable_variables, *self.variables]
            values = self._pure_step(grads, variables, touched, [v.value for v in touched])
            for variable, value in zip(touched, values, strict=True):
                variable.assign(value)
            return
        backend.current().run_step(
            self._bad(grads),
            grads,
            variables,
            self._update,
            lambda finite, bad: self._advance(finite, bad, grads, variables),
        )

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """Apply `(gradient, variable)` pairs; returns `iterations`, as tf.keras does."""
        pairs = list(grads_and_vars)
        self.apply([g for g, _ in pairs], [v for _, v in pairs])
        return self.iterations

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """Return the new values of the trainable and the optimizer variables; changes nothing.

        Args:
            optimizer_variables: Values of `variables`, in that order.
            grads: Gradients of the scaled loss, in the order of the built variables.
            trainable_variables: Values of the built variables.

        Raises:
            LossScaleError: If the optimizer is not built, or numbers of values differ.
        """
        if not self.built:
            raise LossScaleError(
                "stateless_apply needs the optimizer's variables.",
                received="an optimizer that is not built",
                expected="a built one",
                fix="Call optimizer.build(model.trainable_variables) first.",
            )
        touched = [*self._trainable_variables, *self.variables]
        n = len(self._trainable_variables)
        for what, values, expected in (
            ("optimizer_variables", optimizer_variables, len(self.variables)),
            ("trainable_variables", trainable_variables, n),
            ("grads", grads, n),
        ):
            if len(values) != expected:
                raise LossScaleError(
                    f"`{what}` does not match the built optimizer.",
                    received=f"{len(values)} values",
                    expected=f"{expected}",
                    fix="Pass one value for each variable, in the order they were built with.",
                )
        values = [*trainable_variables, *optimizer_variables]
        new = self._pure_step(list(grads), self._trainable_variables, touched, values)
        return new[:n], new[n:]

    def _variables_of(self, grads: list[Any], variables: Sequence[Any] | None) -> list[Any]:
        if variables is None:
            if not self.built:
                raise LossScaleError(
                    "The optimizer does not know which variables the gradients belong to.",
                    received="gradients alone, and an optimizer that is not built",
                    expected="apply(grads, trainable_variables)",
                    fix="Pass the variables, or call build(trainable_variables) first.",
                )
            variables = self._trainable_variables
        variables = list(variables)
        if len(variables) != len(grads):
            raise LossScaleError(
                "Gradients and variables do not match.",
                received=f"{len(grads)} gradients for {len(variables)} variables",
                expected="one gradient, or None, for each variable",
                fix="Pass both lists in the same order.",
            )
        self.build(variables)
        self._check_variables_are_known(variables)
        return variables

    def _bad(self, grads: Sequence[Any]) -> Any:
        """Return a float vector with 1 for each gradient (None left out) that is not finite."""
        values = [backend.current().dense_values(g) for g in grads if g is not None]
        if self.schedule.min_scale < 1.0:
            # Dividing by less than 1 can overflow what is still finite.
            values = [ops.cast(v, "float32") / self.dynamic_scale for v in values]
        if not values:
            return ops.zeros((1,))
        finite = ops.stack([ops.all(ops.isfinite(v)) for v in values])
        return ops.cast(ops.logical_not(finite), "float32")

    def _update(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Hand the unscaled gradients to the inner optimizer."""
        room = backend.current()
        scale = ops.convert_to_tensor(self.dynamic_scale)

        def unscaled(gradient: Any, variable: Any) -> Any:
            # Some variables, float8's scales say, take their gradient as their new value.
            if gradient is None or getattr(variable, "overwrite_with_gradient", False):
                return gradient
            values = ops.cast(room.dense_values(gradient), "float32")
            return room.with_values(gradient, ops.divide(values, scale))

        self.inner_optimizer.apply(
            [unscaled(g, v) for g, v in zip(grads, variables, strict=True)], variables
        )

    def _advance(
        self, finite: bool, bad: Any, grads: Sequence[Any], variables: Sequence[Any]
    ) -> None:
        """Move the schedule and the counters after a step that was applied or skipped."""
        state = self._schedule_variables()
        for key, value in self.schedule.update(state, finite).items():
            state[key].assign(ops.cast(value, state[key].dtype))
        if finite:
            self.applied_steps_variable.assign_add(1)
            self.consecutive_skips_variable.assign(0)
            return
        self.skipped_steps_variable.assign_add(1)
        self.consecutive_skips_variable.assign_add(1)
        positions = [
            self._get_variable_index(v)
            for g, v in zip(grads, variables, strict=True)
            if g is not None
        ]
        counts = self.nonfinite_counts_variable
        hit = ops.cast(bad > 0, counts.dtype)
        if positions != list(range(len(self._trainable_variables))):
            hit = ops.scatter(ops.array(positions)[:, None], hit, tuple(counts.shape))
        counts.assign_add(hit)

    def _pure_step(
        self,
        grads: list[Any],
        variables: Sequence[Any],
        touched: Sequence[Any],
        values: Sequence[Any],
    ) -> list[Any]:
        """Return what a step makes of `values`, the current values of the variables `touched`."""
        mapping = list(zip(touched, values, strict=True))

        def stateless(run: Callable[[], None]) -> Callable[[], list[Any]]:
            def values_after() -> list[Any]:
                with keras.StatelessScope(state_mapping=mapping) as scope:
                    run()
                return [scope.get_current_value(v) for v in touched]

            return values_after

        with keras.StatelessScope(state_mapping=mapping):
            bad = self._bad(grads)

        def applied() -> None:
            self._update(grads, variables)
            self._advance(True, bad, grads, variables)

        def skipped() -> None:
            self._advance(False, bad, grads, variables)

        return list(ops.cond(ops.any(bad > 0), stateless(skipped), stateless(applied)))

    # ---------------------------------------------------------------- saving

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, serialised."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "loss_scale": keras.saving.serialize_keras_object(self.schedule),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """Return the optimizer that `get_config`, ours or stock Keras's, described."""
        config = dict(config)
        for key in ("inner_optimizer", "loss_scale"):
            if isinstance(config.get(key), dict):
                config[key] = keras.saving.deserialize_keras_object(
                    config[key], custom_objects=custom_objects
                )
        return cls(config.pop("inner_optimizer"), **config)

    def save_own_variables(self, store: Any) -> None:
        """Write the scaling state by name; the inner optimizer's is saved beside it."""
        for variable in self._variables:
            store[variable.name] = ops.convert_to_numpy(variable.value)

    def load_own_variables(self, store: Any) -> None:
        """Read the scaling state, ours by name or stock Keras's by position.

        A scale outside the schedule's bounds is brought inside.
        """
        by_name = {variable.name: variable for variable in self._variables}
        places = _STOCK_PLACES if "0" in store else {name: name for name in by_name}
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


def _refuse(kwargs: dict[str, Any]) -> None:
    unknown = [name for name in kwargs if name not in _INNER_ARGUMENTS]
    if unknown:
        raise LossScaleError(
            f"LossScaleOptimizer does not support arguments: `{'`, `'.join(unknown)}`.",
            fix="See the class for what it takes; an optimizer's own settings belong to "
            "`inner_optimizer`.",
        )
    for name, value in kwargs.items():
        if value != _INNER_ARGUMENTS[name]:
            raise LossScaleError(
                f"LossScaleOptimizer does not take `{name}`.",
                received=f"{name}={value!r}",
                fix=f"Set `{name}` on the `inner_optimizer`.",
            )


def _inner(optimizer: Any) -> Any:
    if isinstance(optimizer, str):
        try:
            optimizer = keras.optimizers.get(optimizer)
        except ValueError as error:
            raise LossScaleError(
                "No Keras optimizer has this name.",
                received=repr(optimizer),
                expected='a name such as "adam" or "sgd"',
                fix="Or pass an optimizer object.",
            ) from error
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise LossScaleError(
            "The optimizer scales the loss already; twice would shrink every update.",
            received=f"a {type(optimizer).__module__}.{type(optimizer).__name__}",
            expected="a plain optimizer",
            fix="Wrap its `inner_optimizer` instead.",
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ArgumentTypeError(
            "`inner_optimizer` is no optimizer.",
            received=f"{optimizer!r} of type {type(optimizer).__name__}",
            expected="a keras.optimizers.Optimizer or its name",
            fix='For example LossScaleOptimizer("adam").',
        )
    return optimizer


def _schedule(
    loss_scale: Any, dynamic: bool | None, initial_scale: float | None, growth_steps: int | None
) -> LossScale:
    """Resolve `loss_scale` together with the arguments that Keras 2 and 3 call by other names."""
    legacy = {
        "dynamic": dynamic,
        "initial_scale": initial_scale,
        "dynamic_growth_steps": growth_steps,
    }
    given = {name: value for name, value in legacy.items() if value is not None}
    if not given:
        return resolve(loss_scale)
    if loss_scale != "dynamic":
        raise LossScaleError(
            "The scale is given twice.",
            received=f"loss_scale={loss_scale!r} and {given}",
            expected="one of them",
            fix="Put everything into loss_scale=kerasmp.DynamicLossScale(...).",
        )
    if dynamic is False or dynamic == 0:
        if growth_steps is not None:
            raise LossScaleError(
                "A fixed scale does not grow.",
                received=f"dynamic=False, dynamic_growth_steps={growth_steps!r}",
                expected="dynamic=True, or no dynamic_growth_steps",
                fix="Leave one of them out.",
            )
        return FixedLossScale() if initial_scale is None else FixedLossScale(initial_scale)
    settings: dict[str, Any] = {}
    if initial_scale is not None:
        settings["initial_scale"] = initial_scale
    if growth_steps is not None:
        settings["growth_interval"] = growth_steps
    return DynamicLossScale(**settings)
