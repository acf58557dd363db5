"""The wrapped optimizer: scales the loss, unscales and checks gradients, updates or skips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.nested import optimizer_chain
from kerasmp.backend.optimizer_internals import is_built_with, restore_on_error
from kerasmp.optimizer import (
    build,
    properties,
    scaling,
    serialization,
    settings,
    step_arguments,
    update,
)
from kerasmp.optimizer.fused import Fused
from kerasmp.optimizer.learning_rate_schedule import include_skips
from kerasmp.optimizer.pending import Pending

if TYPE_CHECKING:
    from collections.abc import Sequence


@keras.saving.register_keras_serializable(package="kerasmp")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """An optimizer that scales the loss, unscales the gradients, and skips steps that overflow.

    In each step, the gradients of the scaled loss are summed over replicas, unscaled in float32,
    and checked for inf and NaN. If they are finite, the inner optimizer applies them. If not, the
    step is skipped: no weight, slot variable or `iterations` changes. Then the schedule updates the
    scale. All steps are counted on the device.

    It is a `keras.optimizers.LossScaleOptimizer`, so `compile` does not wrap it a second time.

    Args:
        inner_optimizer: A Keras optimizer or its name, such as "adam".
        loss_scale: "dynamic" (default; `DynamicLossScale()`), "fixed" (`FixedLossScale()`, 2**15),
            a positive number (fixed), a `LossScale`, or None (scale 1, check and skip).
        dynamic: As in Keras 2: False means a fixed scale, True a dynamic one.
        initial_scale: As in Keras 2 and 3: the first scale of the dynamic schedule, or the fixed
            scale with `dynamic=False`.
        dynamic_growth_steps: As in Keras 2 and 3: `growth_interval` of the dynamic schedule.
        skips_advance_schedules: Whether a skipped step advances a `LearningRateSchedule` of the
            inner optimizer as an applied step does; default False. Use it for schedules that
            should end with the last batch. `iterations`, which moments and averages depend on,
            never counts a skipped step.
        fused: Whether plain Adam, AdamW and SGD update each variable in one kernel if the
            framework has one (default). `fused_update` is None if they cannot.
        name: Name of the optimizer.
        **kwargs: Not supported. The error says where each argument belongs.

    Attributes:
        schedule: The `LossScale` in use.
        inner_optimizer: The wrapped optimizer.
        dynamic_scale: float32 scalar variable, the current scale (after `build`).
        step_counter: Integer scalar variable, good steps since the scale last moved.

    Raises:
        LossScaleError: For a scale, schedule or name that cannot work, for an inner optimizer that
            already scales the loss, and for arguments that belong to the inner optimizer.
        ArgumentTypeError: If `inner_optimizer` is not an optimizer.

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

    pending: Pending
    _skip_inner_once = False

    def __init__(  # noqa: PLR0913 - three are older names for what loss_scale says
        self,
        inner_optimizer: Any,
        *,
        loss_scale: Any = "dynamic",
        dynamic: bool | None = None,
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
        skips_advance_schedules: bool = False,
        fused: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        settings.check_kwargs(kwargs)
        settings.check_name(name)
        inner_optimizer = settings.resolve_inner(inner_optimizer)
        schedule = settings.resolve_schedule(
            loss_scale,
            dynamic=dynamic,
            initial_scale=initial_scale,
            dynamic_growth_steps=dynamic_growth_steps,
        )
        # Not the constructor of the parent, which would set up its own rule with fixed factors.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        object.__setattr__(self, "pending", Pending())  # not a state that Keras should track
        self.inner_optimizer = inner_optimizer
        self.schedule = schedule
        self.skips_advance_schedules = skips_advance_schedules
        self.fused = fused
        Fused.of(inner_optimizer, schedule)  # looks up the classes now, and not in a traced step
        if self.skips_advance_schedules:
            include_skips(self)
        settings.drop_second_scale(inner_optimizer)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, settings.validate_attribute(self, name, value))

    # ----------------------------------------------------------------- state

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the scaling state and build the inner optimizer. Later calls do nothing.

        Args:
            var_list: The trainable variables, in the order of the gradients.

        Raises:
            ArgumentTypeError: If it is not a list of variables.
        """
        if self.built:
            return
        var_list = step_arguments.as_variables("var_list", var_list)
        with restore_on_error(optimizer_chain(self)):
            build.add_variables(self, var_list)
            keras.optimizers.Optimizer.build(self, var_list)

    def schedule_variables(self) -> dict[str, Any]:
        """Return the variables that hold the state of the schedule, by its keys."""
        keys = self.schedule.init()
        return {key: self.scale_variable if key == "scale" else getattr(self, key) for key in keys}

    def state_variables(self) -> list[Any]:
        """Return the variables that hold the state of the schedule, and the counters."""
        return [
            *self.schedule_variables().values(),
            self.counts_variable,
            self.nonfinite_counts_variable,
        ]

    def indices_of(self, variables: Sequence[Any]) -> list[int]:
        """Return the index of each variable among `target_variables`."""
        if is_built_with(self, variables):
            return list(range(len(variables)))
        return [self._get_variable_index(v) for v in variables]

    own_variables = property(properties.own_variables)
    target_variables = property(properties.target_variables)

    # ---------------------------------------------------------------- a step

    @backend.without_autograph
    def scale_loss(self, loss: Any) -> Any:
        """Return `loss` times the current scale, in float32.

        Args:
            loss: Scalar or tensor of any shape; a float16 loss is cast first, since scaling it in
                float16 would overflow at 2 with the default scale.

        Raises:
            LossScaleError: While JAX traces a step, outside of a `keras.StatelessScope` that holds
                `variables`: the scale would become a constant. Also if the loss is not a tensor of
                real numbers.
        """
        loss = ops.cast(step_arguments.as_real_tensor("The loss", loss), "float32")
        scale = self.scale_here("scale_loss")
        if backend.current().LOSS_VISIBLE_IN_APPLY:
            self.note_loss(loss)
        return ops.multiply(loss, scale)

    scale_here = scaling.scale_here
    note_loss = scaling.note_loss
    get_scaled_loss = scaling.get_scaled_loss
    get_unscaled_gradients = scaling.get_unscaled_gradients
    forget_unscaled = scaling.forget_unscaled

    @backend.without_autograph
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Unscale, check and apply the gradients of the scaled loss, or skip the step.

        Args:
            grads: Gradients of the scaled loss; None for a variable without one.
            trainable_variables: The variables that `grads` belong to. It can be left out after
                `build`.

        Raises:
            LossScaleError: If the numbers of gradients and variables differ, variables are missing,
                every gradient is None, one does not fit its variable, or the inner optimizer has a
                `loss_scale_factor`. In the train step of a kerasmp model also if it is not known
                whether the loss was scaled.
            ArgumentTypeError: If an argument is not a list, or an item is not a variable.

        Warns:
            LossScaleWarning: If the train step of a kerasmp model does not scale the loss. The
                gradients are then not unscaled, and the schedule does not change.
        """
        grads = step_arguments.as_list("grads", grads)
        given = (
            None
            if trainable_variables is None
            else step_arguments.as_list("trainable_variables", trainable_variables)
        )
        if not grads and not given:
            return
        # Errors come first, before anything is created or changed.
        variables = step_arguments.variables_for(self, grads, given)
        backend.current().require_replica_context()
        grads = step_arguments.as_gradients(grads, variables)
        update.run(self, update.prepare_step(self, grads, variables))

    @backend.without_autograph
    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """Apply `(gradient, variable)` pairs, and return `iterations` as tf.keras does."""
        grads, variables = step_arguments.unzip_pairs(grads_and_vars)
        with update.using_method("apply_gradients"):
            self.apply(grads, variables)
        return self.iterations

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """Return the new values of the trainable and the optimizer variables.

        On JAX it changes nothing. On torch, it updates the tensors of the trainable variables in
        place, as a plain Keras optimizer does.

        Args:
            optimizer_variables: Values of `variables`, in that order.
            grads: Gradients of the scaled loss, in the order of the built variables.
            trainable_variables: Values of the built variables.

        Raises:
            LossScaleError: If the optimizer is not built, the number of values is wrong, or every
                gradient is None. Always on TensorFlow, as with a plain Keras optimizer.
        """
        backend.current().require_pure_step()
        state, grads, weights = step_arguments.pure_step_arguments(
            self, optimizer_variables, grads, trainable_variables
        )
        variables = [*self._trainable_variables, *self.variables]
        values = [*weights, *state]
        scope = keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True)))
        with scope, update.using_method("stateless_apply"):
            step = update.prepare_step(self, grads, self._trainable_variables)
        new = update.run_pure(self, self.inner_optimizer, step, variables, values)
        number = len(self._trainable_variables)
        return new[:number], new[number:]

    with_known_loss = update.with_known_loss
    finalize_variable_values = update.finalize_variable_values

    # --------------------------------------------------------------- reading

    dynamic_scale = property(properties.dynamic_scale, properties.set_dynamic_scale)
    loss_scale = scale = property(properties.loss_scale, serialization.restart_schedule)
    skipped_steps = property(properties.skipped_steps)
    applied_steps = property(properties.applied_steps)
    consecutive_skips = property(properties.consecutive_skips)
    last_step_skipped = property(properties.last_step_skipped)
    nonfinite_counts = property(properties.nonfinite_counts)
    nan_counts = property(properties.nan_counts)
    skip_causes = property(properties.skip_causes)
    skipped_last = properties.skipped_last
    skips = properties.skips
    initial_scale = property(properties.initial_scale)
    dynamic_growth_steps = property(properties.dynamic_growth_steps)

    # --------------------------------------------------- the inner optimizer

    def exclude_from_weight_decay(self, *args: Any, **kwargs: Any) -> None:
        """Exclude variables from the weight decay of the inner optimizer, before `build`.

        Args:
            *args: As for `keras.optimizers.Optimizer.exclude_from_weight_decay`.
            **kwargs: The same: `var_list`, `var_names`.
        """
        self.inner_optimizer.exclude_from_weight_decay(*args, **kwargs)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate: its variable, or the current value of its schedule.

        As in Keras, you can set a number if it is one, or a schedule before `build`.
        """
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        settings.check_learning_rate(value)
        self.inner_optimizer.learning_rate = value
        if self.skips_advance_schedules:
            include_skips(self)

    optimizers = property(properties.optimizers)
    accumulated_steps = property(properties.accumulated_steps)
    fused_update = property(properties.fused_update)

    # ---------------------------------------------------------------- saving

    def get_weights(self) -> list[Any]:
        """Return the values of `variables`, the inner optimizer's too, as NumPy arrays."""
        return [ops.convert_to_numpy(variable) for variable in self.variables]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the values of `variables`, the inner optimizer's too.

        Args:
            weights: What `get_weights` returned. Or the values of `variables` of stock Keras's
                LossScaleOptimizer, or of a plain optimizer for the inner one.

        Raises:
            LossScaleError: If the optimizer is not built, or `weights` does not fit it. Then
                nothing changes.
        """
        serialization.set_weights(self, weights)

    def __dir__(self) -> list[str]:
        """Return the names of all attributes, once without `inner_optimizer` after some loads.

        Keras's loader calls `load_own_variables`, and then loads each attribute that `dir` finds.
        It must not load an inner optimizer that `load_own_variables` has set from the file of
        another kind of optimizer, or has left alone since the state does not fit. Keras offers no
        other way to leave out an attribute: its list of attributes to skip is private and the same
        for all optimizers, and `load_own_variables` cannot reach the inner optimizer's place in the
        file, which must stay for older files.
        """
        names = list(super().__dir__())
        if self._skip_inner_once:
            self._skip_inner_once = False
            names.remove("inner_optimizer")
        return names

    def save_own_variables(self, store: Any) -> None:
        """Write the scaling state by name. Keras saves the inner optimizer beside it."""
        self._skip_inner_once = False
        serialization.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Read the state of this class, of stock Keras's wrapper, or of a plain optimizer.

        A scale outside the bounds of the schedule is brought inside. If the state does not fit,
        nothing changes, not even in the inner optimizer, and there is a `LossScaleWarning`.
        """
        self._skip_inner_once = serialization.load(self, store)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "loss_scale": keras.saving.serialize_keras_object(serialization.current_schedule(self)),
            "skips_advance_schedules": self.skips_advance_schedules,
            **({} if self.fused else {"fused": False}),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """Return the optimizer that `get_config`, of this class or stock Keras's, described."""
        config = serialization.configuration(config)
        for key in ("inner_optimizer", "loss_scale"):
            if isinstance(config.get(key), dict):
                config[key] = keras.saving.deserialize_keras_object(
                    config[key], custom_objects=custom_objects
                )
        return cls(config.pop("inner_optimizer"), **config)
