"""The wrapped optimizer: scales the loss, unscales and checks the gradients, updates or skips."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any, Self

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.keras_private import learning_rate_functions, weights_and_averages
from kerasmp.errors import LossScaleError, LossScaleWarning
from kerasmp.loss_scale import validation
from kerasmp.optimizer import arguments
from kerasmp.optimizer.advancing import include_skips
from kerasmp.optimizer.causes import LossNotes
from kerasmp.optimizer.companions import InnerSettings
from kerasmp.optimizer.compiled_steps import (
    CompiledSteps,
    kept_by_a_trace,
    rates_given,
    rates_now,
)
from kerasmp.optimizer.step import Step, SteppingState
from kerasmp.optimizer.unscaled import UnscaledMarks, UnscalingByHand, number_of, refuse_baking

if TYPE_CHECKING:
    from collections.abc import Sequence


@keras.saving.register_keras_serializable(package="kerasmp")
class LossScaleOptimizer(InnerSettings, UnscalingByHand, SteppingState):
    """Wraps an optimizer: the loss is scaled, the gradients are unscaled, bad steps are skipped.

    Each step: gradients of the scaled loss are summed over replicas, unscaled in float32 and
    checked for inf and NaN. Then either the inner optimizer gets them, or the step is skipped: no
    weight, no slot and no `iterations` change. The schedule moves the scale. Everything is counted
    on the device.

    It is a `keras.optimizers.LossScaleOptimizer`, so `compile` does not wrap it a second time.

    Args:
        inner_optimizer: A Keras optimizer or its name, such as "adam".
        loss_scale: "dynamic" (default; `DynamicLossScale()`), "fixed" (`FixedLossScale()`, 2**15),
            a positive number (fixed), a `LossScale`, or None (scale 1, check and skip).
        dynamic: As in Keras 2: False means a fixed scale, True a dynamic one.
        initial_scale: As in Keras 2 and 3: the first scale of the dynamic schedule, or with
            `dynamic=False` the fixed one.
        dynamic_growth_steps: As in Keras 2 and 3: `growth_interval` of the dynamic schedule.
        skips_advance_schedules: Whether a skipped step moves a `LearningRateSchedule` of the inner
            optimizer on, as if it had been applied; default False. For schedules that shall end
            with the last batch. `iterations`, by which moments and averages go, never counts it.
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

    def __init__(  # noqa: PLR0913 - three of them are Keras's names for what loss_scale says
        self,
        inner_optimizer: Any,
        *,
        loss_scale: Any = "dynamic",
        dynamic: bool | None = None,
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
        skips_advance_schedules: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        arguments.refuse(kwargs)
        inner_optimizer = arguments.inner(inner_optimizer)
        schedule = arguments.schedule(
            loss_scale,
            dynamic=dynamic,
            initial_scale=initial_scale,
            growth_steps=dynamic_growth_steps,
        )
        # Not the parent's: it would set up its own rule, whose factors are hard-coded.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        backend.current()  # imported here, and not while a step is traced
        # None of them is state: Keras must not track them.
        object.__setattr__(self, "_compiled_steps", CompiledSteps())
        object.__setattr__(self, "_losses", LossNotes())
        object.__setattr__(self, "_unscaled", UnscaledMarks())
        self.inner_optimizer = inner_optimizer
        self.schedule = schedule
        self.skips_advance_schedules = validation.switch(
            "skips_advance_schedules", skips_advance_schedules
        )
        if self.skips_advance_schedules:
            include_skips(self)
        if inner_optimizer.loss_scale_factor is not None:
            warnings.warn(
                f"The inner optimizer's loss_scale_factor={inner_optimizer.loss_scale_factor} is "
                "dropped, the gradients would be scaled twice. For a fixed scale pass "
                f"loss_scale={inner_optimizer.loss_scale_factor} here.",
                LossScaleWarning,
                stacklevel=2,
            )
            inner_optimizer.loss_scale_factor = None

    # ---------------------------------------------------------------- a step

    def scale_loss(self, loss: Any) -> Any:
        """Return `loss` times the current scale, in float32.

        Args:
            loss: Scalar or tensor of any shape; a float16 loss is cast first, since scaling it in
                float16 would overflow at 2 with the default scale.

        Raises:
            LossScaleError: While JAX traces a step, outside a `keras.StatelessScope` that holds
                `variables`: the scale would be baked in.
        """
        scale = self._scale_here("scale_loss")
        loss = ops.cast(loss, "float32")
        if backend.current().LOSS_MEETS_APPLY:
            self.note_loss(loss)
        return ops.multiply(loss, scale)

    def _read(self, name: str) -> Any:
        refuse_baking(
            getattr(self, name).value,
            f"a read of `{name}` as a number",
            "Read it after the step; within a step use the variable, or scale_loss.",
        )
        return super()._read(name)

    def note_loss(self, loss: Any) -> None:
        """Tell the next `apply` what the loss was, so that it knows why it skips a step.

        `scale_loss` does it by itself, except on JAX, where it runs inside the function that is
        differentiated. A loop there calls this outside of it, before `apply` or `stateless_apply`
        and in the same traced function. Of several losses noted, all must be finite.

        Args:
            loss: The unscaled loss, of any shape.
        """
        # Nobody differentiates the note, and torch would keep the graph behind it.
        replica, trace = backend.current().place()
        self._losses.add(replica, trace, ops.stop_gradient(loss))

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Unscale, check and apply the gradients of the scaled loss, or skip the step.

        Args:
            grads: Gradients of the scaled loss; None for a variable without one.
            trainable_variables: The variables that `grads` belong to; may be left out after
                `build`.

        Raises:
            LossScaleError: If numbers of gradients and variables differ, variables are missing or
                every gradient is None, or if the inner optimizer got a `loss_scale_factor`.
        """
        grads = list(grads)
        given = None if trainable_variables is None else list(trainable_variables)
        if not grads and not given:
            return
        variables = self._variables_of(grads, given)
        room = backend.current()
        replica, trace = room.place()
        # What is wrong is told before anything is made, taken or changed.
        room.refuse_no_replica()
        arguments.refuse_second_scale(self.inner_optimizer)
        unscaled = self._unscaled.look(replica, trace, number_of(grads))
        self.build(variables)
        self._unscaled.drop(replica, trace)
        losses = self._losses.take(replica, trace)
        grads, losses = room.agreed(grads, variables, losses)
        step = Step(grads, variables, unscaled, losses)
        if keras.backend.backend() == "jax":
            # JAX branches only in pure code, so the eager step is the pure one, then assigned.
            self._apply_pure(step)
            return
        step = self._with_updates(step)
        room.run_step(self._finite(step), step, self._update, self._advance, self.inner_optimizer)

    def _apply_pure(self, step: Step) -> None:
        touched = [*self._trainable_variables, *self.variables]
        functions = learning_rate_functions(self.inner_optimizer)
        # Not the first step itself, whose gradients would live as long as the program.
        plan = dataclasses.replace(step, grads=(), losses=())

        def pure(grads: Any, losses: Any, rates: Any, values: Any) -> list[Any]:
            with rates_given(functions, rates):
                this = dataclasses.replace(plan, grads=grads, losses=losses)
                return self._pure_step(this, touched, values)

        # Made anew each time, the step would be compiled each time.
        positions = tuple(self._get_variable_index(v) for v in step.variables)
        key = (step.unscaled, positions, kept_by_a_trace(self.inner_optimizer))
        compiled = self._compiled_steps.get(key, lambda: backend.current().compiled(pure))
        before = [v.value for v in touched]
        values = compiled(step.grads, step.losses, rates_now(functions), before)
        for variable, value in zip(touched, values, strict=True):
            variable.assign(value)

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
        """Return the new values of the trainable and the optimizer variables.

        On JAX it changes nothing. On torch, as with a plain Keras optimizer, the tensors of the
        trainable variables are updated in place.

        Args:
            optimizer_variables: Values of `variables`, in that order.
            grads: Gradients of the scaled loss, in the order of the built variables.
            trainable_variables: Values of the built variables.

        Raises:
            LossScaleError: If the optimizer is not built, numbers of values differ, or every
                gradient is None. Always on TensorFlow, as of a plain Keras optimizer.
        """
        if keras.backend.backend() == "tensorflow":
            raise LossScaleError(
                "stateless_apply is not supported with the TensorFlow backend.",
                received="a call on TensorFlow, whose variables the step would change in place",
                expected="JAX or torch",
                fix="Call optimizer.apply(grads, variables), also inside a tf.function.",
            )
        if not self.built:
            raise LossScaleError(
                "stateless_apply needs the optimizer's variables.",
                received="an optimizer that is not built",
                expected="a built one",
                fix="Call optimizer.build(model.trainable_variables) first.",
            )
        arguments.refuse_second_scale(self.inner_optimizer)
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
        arguments.refuse_no_gradient(grads)
        values = [*trainable_variables, *optimizer_variables]
        replica, trace = backend.current().place()
        unscaled = self._unscaled.look(replica, trace, number_of(grads))
        self._unscaled.drop(replica, trace)
        losses = self._losses.take(replica, trace)
        step = Step(list(grads), self._trainable_variables, unscaled, losses)
        new = self._pure_step(step, touched, values)
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
        arguments.refuse_no_gradient(grads)
        if self.built:
            self._check_built_with(variables)
        return variables

    def _check_built_with(self, variables: Sequence[Any]) -> None:
        try:
            self._check_variables_are_known(variables)
        except ValueError as error:
            raise LossScaleError(
                "Unknown variable: the optimizer was built with others.",
                received=arguments.names(variables),
                expected=f"variables among {arguments.names(self._trainable_variables)}",
                fix="Use one optimizer for each model, and build it with all variables that it "
                "shall ever update.",
            ) from error

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Write averages (`use_ema`) into the weights at the end of `fit`.

        Before the first applied step there are none: they are what the weights were at `build`.
        """
        if int(ops.convert_to_numpy(self.iterations)) > 0:
            self.inner_optimizer.finalize_variable_values(var_list)
            for variable, average in weights_and_averages(self.inner_optimizer):
                backend.current().keep_apart(average, variable)

    # ---------------------------------------------------------------- saving

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, serialised."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "loss_scale": keras.saving.serialize_keras_object(self.schedule),
            "skips_advance_schedules": self.skips_advance_schedules,
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
