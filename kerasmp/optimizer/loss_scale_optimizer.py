"""The wrapped optimizer: scales the loss, unscales and checks the gradients, updates or skips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import keras
from keras import ops

from kerasmp import backend
from kerasmp.backend.keras_internals import are_all_of, unchanged_if_it_fails
from kerasmp.backend.nested import optimizer_chain
from kerasmp.loss_scale import validation
from kerasmp.optimizer import arguments, build, manual_scaling, properties, serialization, update
from kerasmp.optimizer.fused import Fused
from kerasmp.optimizer.learning_rate_schedule import include_skips
from kerasmp.optimizer.scaled_losses import note_scaling
from kerasmp.optimizer.unscaled_gradients import refuse_jit_constant

if TYPE_CHECKING:
    from collections.abc import Sequence


@keras.saving.register_keras_serializable(package="kerasmp")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
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
        fused: Whether plain Adam, AdamW and SGD update each variable in one kernel where the
            framework has one (default). `fused_update` is None where they cannot.
        name: Name of the optimizer.
        **kwargs: Refused, with a word on where each belongs.

    Attributes:
        schedule: The `LossScale` in use.
        inner_optimizer: The wrapped optimizer.
        dynamic_scale: float32 scalar variable, the current scale (after `build`).
        step_counter: Integer scalar variable, good steps since the scale last moved.

    Raises:
        LossScaleError: For a scale, schedule or name that cannot work, for an inner optimizer that
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

    pending: update.Pending
    _inner_is_settled = False

    def __init__(  # noqa: PLR0913 - three of them are Keras's names for what loss_scale says
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
        arguments.refuse(kwargs)
        arguments.refuse_name(name)
        inner_optimizer = arguments.inner(inner_optimizer)
        schedule = arguments.schedule(
            loss_scale,
            dynamic=dynamic,
            initial_scale=initial_scale,
            growth_steps=dynamic_growth_steps,
        )
        # Not the parent's: it would set up its own rule, whose factors are hard-coded.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        object.__setattr__(self, "pending", update.Pending())  # no state, for Keras to track
        self.inner_optimizer = inner_optimizer
        self.schedule = schedule
        self.skips_advance_schedules = validation.switch(
            "skips_advance_schedules", skips_advance_schedules
        )
        self.fused = validation.switch("fused", fused)
        Fused.of(inner_optimizer, schedule)  # looks for classes now, and not in a graph
        if self.skips_advance_schedules:
            include_skips(self)
        arguments.drop_second_scale(inner_optimizer)

    def __setattr__(self, name: str, value: Any) -> None:
        arguments.refuse_setting(self, name, value)
        super().__setattr__(name, value)

    # ----------------------------------------------------------------- state

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the scaling state and build the inner optimizer; later calls do nothing.

        Args:
            var_list: The trainable variables, in the order of the gradients.

        Raises:
            ArgumentTypeError: If it is no list of variables.
        """
        if self.built:
            return
        var_list = arguments.variables_in("var_list", var_list)
        with unchanged_if_it_fails(optimizer_chain(self)):
            build.add_variables(self, var_list)
            keras.optimizers.Optimizer.build(self, var_list)

    def schedule_variables(self) -> dict[str, Any]:
        """Return the variables that hold the schedule's state, by its keys."""
        keys = self.schedule.init()
        return {key: self.scale_variable if key == "scale" else getattr(self, key) for key in keys}

    def state_variables(self) -> list[Any]:
        """Return those, and the counters."""
        return [
            *self.schedule_variables().values(),
            self.counts_variable,
            self.nonfinite_counts_variable,
        ]

    def indices_of(self, variables: Sequence[Any]) -> list[int]:
        """Return the index of each variable among `target_variables`."""
        if are_all_of(self, variables):
            return list(range(len(variables)))
        return [self._get_variable_index(v) for v in variables]

    own_variables = property(properties.own_variables)
    target_variables = property(properties.target_variables)

    # ---------------------------------------------------------------- a step

    @backend.as_written
    def scale_loss(self, loss: Any) -> Any:
        """Return `loss` times the current scale, in float32.

        Args:
            loss: Scalar or tensor of any shape; a float16 loss is cast first, since scaling it in
                float16 would overflow at 2 with the default scale.

        Raises:
            LossScaleError: While JAX traces a step, outside a `keras.StatelessScope` that holds
                `variables`: the scale would be baked in. Also if the loss is no real tensor.
        """
        loss = ops.cast(arguments.real_tensor("The loss", loss), "float32")
        scale = self.scale_here("scale_loss")
        if backend.current().LOSS_VISIBLE_IN_APPLY:
            self.note_loss(loss)
        return ops.multiply(loss, scale)

    def scale_here(self, what: str) -> Any:
        """Return the scale for `what`, as code that may be traced sees it."""
        note_scaling(self, what)
        scale = self.scale_variable.value if self.built else self.schedule.initial_scale
        refuse_jit_constant(
            scale,
            what,
            "Call optimizer.build(model.trainable_variables) before tracing, and scale and unscale "
            "within `keras.StatelessScope(list(zip(optimizer.variables, values)))`.",
        )
        return scale

    def note_loss(self, loss: Any) -> None:
        """Tell the next `apply` what the loss was, so that it knows why it skips a step.

        `scale_loss` does so, except on JAX, where it runs in the function that is differentiated. A
        loop there calls this outside of it, before `apply` or `stateless_apply` in the same trace.

        Args:
            loss: The unscaled loss, of any shape. Of several losses noted, all must be finite.
        """
        loss = arguments.real_tensor("The loss", loss)
        # Nobody differentiates the note, and torch would keep the graph behind it.
        self.pending.losses.add(*backend.current().trace_context(), ops.stop_gradient(loss))

    get_scaled_loss = manual_scaling.get_scaled_loss
    get_unscaled_gradients = manual_scaling.get_unscaled_gradients
    forget_unscaled = manual_scaling.forget_unscaled

    @backend.as_written
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Unscale, check and apply the gradients of the scaled loss, or skip the step.

        Args:
            grads: Gradients of the scaled loss; None for a variable without one.
            trainable_variables: The variables that `grads` belong to; may be left out after
                `build`.

        Raises:
            LossScaleError: If numbers of gradients and variables differ, variables are missing,
                every gradient is None or one does not fit its variable, or if the inner optimizer
                got a `loss_scale_factor`. In the train step of a model of ours also if it cannot
                know whether the loss was scaled.
            ArgumentTypeError: If what is given is no list, or something in it no variable.

        Warns:
            LossScaleWarning: If such a train step has scaled no loss. The gradients are taken as
                they are, and the schedule stays as it is.
        """
        grads = arguments.listed("grads", grads)
        given = (
            None
            if trainable_variables is None
            else arguments.listed("trainable_variables", trainable_variables)
        )
        if not grads and not given:
            return
        variables = arguments.variables_of(self, grads, given)
        # What is wrong is told before anything is made, taken or changed.
        backend.current().refuse_no_replica()
        grads = arguments.gradients(grads, variables)
        update.run(self, update.taken(self, grads, variables))

    @backend.as_written
    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """Apply `(gradient, variable)` pairs; returns `iterations`, as tf.keras does."""
        grads, variables = arguments.pairs_in(grads_and_vars)
        with update.through("apply_gradients"):
            self.apply(grads, variables)
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
        backend.current().refuse_pure_step()
        state, grads, weights = arguments.stateless(
            self, optimizer_variables, grads, trainable_variables
        )
        touched = [*self._trainable_variables, *self.variables]
        values = [*weights, *state]
        scope = keras.StatelessScope(state_mapping=list(zip(touched, values, strict=True)))
        with scope, update.through("stateless_apply"):
            step = update.taken(self, grads, self._trainable_variables)
        new = update.pure(self, self.inner_optimizer, step, touched, values)
        number = len(self._trainable_variables)
        return new[:number], new[number:]

    with_known_loss = update.with_known_loss
    finalize_variable_values = update.finalize_variable_values

    # --------------------------------------------------------------- reading

    dynamic_scale = property(properties.dynamic_scale, properties.keep_dynamic_scale)
    loss_scale = scale = property(properties.loss_scale, serialization.start_anew)
    skipped_steps = property(properties.skipped_steps)
    applied_steps = property(properties.applied_steps)
    consecutive_skips = property(properties.consecutive_skips)
    last_step_skipped = property(properties.last_step_skipped)
    nonfinite_counts = property(properties.nonfinite_counts)
    skip_causes = property(properties.skip_causes)
    skipped_last = properties.skipped_last
    skips = properties.skips
    initial_scale = property(properties.initial_scale)
    dynamic_growth_steps = property(properties.dynamic_growth_steps)

    # -------------------------------------------------- the optimizer inside

    def exclude_from_weight_decay(self, *args: Any, **kwargs: Any) -> None:
        """Leave variables out of the inner optimizer's weight decay; call it before `build`.

        Args:
            *args: As for `keras.optimizers.Optimizer.exclude_from_weight_decay`.
            **kwargs: The same: `var_list`, `var_names`.
        """
        self.inner_optimizer.exclude_from_weight_decay(*args, **kwargs)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate: its variable, or what its schedule gives now.

        Settable, as in Keras: to a number if it is one, or before `build` to a schedule.
        """
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        arguments.refuse_rate(value)
        self.inner_optimizer.learning_rate = value
        if self.skips_advance_schedules:
            include_skips(self)

    optimizers = property(properties.optimizers)
    accumulated_steps = property(properties.accumulated_steps)
    fused_update = property(properties.fused_update)

    # ---------------------------------------------------------------- saving

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
        serialization.set_list(self, weights)

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
        serialization.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Read the scaling state: ours, stock Keras's, or a plain optimizer's for the inner one.

        A scale outside the schedule's bounds is brought inside. A state that does not fit changes
        nothing, in the inner optimizer neither, and earns a `LossScaleWarning`.
        """
        self._inner_is_settled = serialization.load(self, store)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, serialised."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "loss_scale": keras.saving.serialize_keras_object(serialization.schedule_now(self)),
            "skips_advance_schedules": self.skips_advance_schedules,
            **({} if self.fused else {"fused": False}),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """Return the optimizer that `get_config`, ours or stock Keras's, described."""
        config = serialization.configuration(config)
        for key in ("inner_optimizer", "loss_scale"):
            if isinstance(config.get(key), dict):
                config[key] = keras.saving.deserialize_keras_object(
                    config[key], custom_objects=custom_objects
                )
        return cls(config.pop("inner_optimizer"), **config)
