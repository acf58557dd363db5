"""Keras models in which a skipped step changes nothing, with losses in float32."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.keras_internals import Functional, functional_init_arguments
from kerasmp.errors import PolicyError, check_bool, check_model
from kerasmp.model.adopt import Adopted, adopted_class, functional_class, registered
from kerasmp.model.first_batch import look_no_longer, with_first_batch
from kerasmp.model.float32 import at_least_float32, cast, widen_activity_regularizers
from kerasmp.model.guards import guard_replaced, is_guarded, with_guards
from kerasmp.model.hints import dtype_hints
from kerasmp.model.optimizers import (
    CHECKED_LATE_LAYERS,
    adopt_optimizer,
    has_saved_optimizer,
    needs_wrapper,
    warn_of_stock_wrapper,
    warn_of_unscaled,
    wrapped,
)
from kerasmp.model.serialization import apply_extras, warn_of_lost_values, warn_of_unsaved_policies
from kerasmp.model.train_step import keras_step, nan_if_empty, refuse_training, reports_nan
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.optimizer.scale_tracking import record_replacement
from kerasmp.policy import Policy, global_policy
from kerasmp.policy.follow import RulesToFollow

if TYPE_CHECKING:
    from kerasmp.model.saved_layers import SavedLayers


@keras.saving.register_keras_serializable(package="kerasmp")
@with_guards
class Model(keras.Model):
    """`keras.Model` for mixed precision: a drop-in replacement with the same three ways of use.

    It differs in these points:

    - `compile` wraps the optimizer in `LossScaleOptimizer` as soon as any layer computes in
      float16, not only if the model's own policy is "mixed_float16".
    - A skipped step changes nothing: not BatchNormalization statistics, seeds, the averages of loss
      and metrics, or any other non-trainable variable. This holds for a custom `train_step` too.
    - Losses and metrics get float16 and bfloat16 outputs in float32. Extra losses (`add_loss`,
      activity regularizers) are summed in float32.
    - An error about mixed dtypes has a note that explains it.
    - Under a policy with `output=` the model's outputs have that dtype. Under a policy with class
      rules or `rules="safe"` its layers follow these rules.
    - Saved files contain `auto_scale_loss`.

    Args:
        *args: As for `keras.Model`: `inputs, outputs` or nothing.
        **kwargs: As for `keras.Model`: `inputs`, `outputs`, `name`, `trainable`, `dtype`.

    Raises:
        PolicyError: If rules of the global policy disagree on a layer, or would change the dtype
            of existing weights. A subclass creates its layers later, and raises it when called.

    Example:

    >>> inputs = keras.Input((4,))
    >>> outputs = keras.layers.Dense(2, dtype="mixed_float16")(inputs)
    >>> model = Model(inputs, outputs)
    >>> model.compile("sgd", "mse")
    >>> type(model.optimizer).__name__
    'LossScaleOptimizer'
    """

    optimizer: Any
    _auto_scale_loss = True
    _output_dtype: str | None = None
    _saves_layer_policies = False  # whether files contain the policy of each layer
    # This value is for an adopted model, which follows no rules.
    _rules: RulesToFollow | SavedLayers = RulesToFollow(Policy("float32"))
    _for_inference = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Guard the methods that a user's subclass, or a mixin of it, overrides."""
        super().__init_subclass__(**kwargs)
        with_guards(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - the class says it
        # As keras.Model does. For a subclass, __init__ decides, by the arguments that it gets.
        if cls is Model and functional_init_arguments(args, kwargs):
            return super().__new__(FunctionalModel, *args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if functional_init_arguments(args, kwargs) and not isinstance(
            self, Functional | keras.Sequential
        ):
            # Here keras.Model would rewrite the bases of Model itself, for all models at once.
            cls: Any = type(self)
            functional = functional_class(cls, FunctionalModel)
            object.__setattr__(self, "__class__", functional)
        super().__init__(*args, **kwargs)
        try:
            policy = global_policy()
        except PolicyError:  # a user-defined one, which Keras itself follows entirely
            policy = Policy("float32")
        self._output_dtype = policy.output_dtype
        self._rules = RulesToFollow(policy)
        self._saves_layer_policies = self._rules.any
        self._apply_rules()

    def _apply_rules(self, *inputs: Any) -> None:
        """Let new layers follow the rules, and their activity regularizers see float32.

        In a call of a built model this finds no new layers, and sets nothing.
        """
        self._rules.follow(self, *inputs)
        widen_activity_regularizers(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Widen regularizers once the model is built, and guard new methods."""
        becomes_built = name == "built" and value and not getattr(self, "built", False)
        super().__setattr__(name, value)
        if becomes_built:
            widen_activity_regularizers(self)
        if is_guarded(name):
            guard_replaced(self, Model)

    @backend.without_autograph
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, in the `output` dtype of the policy that the model was made under."""
        self._apply_rules(*args)
        with dtype_hints():
            return self._in_output_dtype(super().__call__(*args, **kwargs))

    def fit(self, *args: Any, probe: bool = True, **kwargs: Any) -> Any:
        """Train the model; see `keras.Model.fit` for the arguments.

        Args:
            *args: As for `keras.Model.fit`.
            probe: Whether to run the first batch forward twice before the first step, in float32
                and under the model's policy, and to warn of layers whose values differ by more than
                rounding explains. It happens once for a model, and takes as long as two to four
                predictions of that batch, run eagerly. Default True.
            **kwargs: As for `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.
        """
        check_bool("probe", probe)
        if probe:
            given = inspect.signature(super().fit).bind(*args, **kwargs)
            given.arguments["callbacks"] = with_first_batch(given.arguments.get("callbacks"))
            args, kwargs = given.args, given.kwargs
        try:
            return super().fit(*args, **kwargs)
        finally:
            look_no_longer(self)

    def stateless_call(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the outputs and the new state; see `keras.Model.stateless_call`."""
        self._apply_rules()
        with dtype_hints():
            outputs, *state = super().stateless_call(*args, **kwargs)
        return self._in_output_dtype(outputs), *state

    def _in_output_dtype(self, outputs: Any) -> Any:
        if self._output_dtype is None:
            return outputs
        return keras.tree.map_structure(functools.partial(cast, dtype=self._output_dtype), outputs)

    # The guards around these three, and around those of subclasses, save what Keras would lose.
    def get_config(self) -> dict[str, Any]:
        """Return the parent's config, and the settings that a kerasmp model adds."""
        return dict(super().get_config())

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Any:
        """Return the model that `get_config` described."""
        model = super().from_config(config, custom_objects=custom_objects)
        apply_extras(model, {})  # a setting that the file lacks must not come from today's policy
        return model

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Build the model, and give layers that this creates the policies in the file."""
        super().build_from_config(config)

    def save_assets(self, dir_path: str) -> None:
        """Save nothing. Keras calls this in `save`, and not in `save_weights`.

        Warns:
            PolicyWarning: If the file does not contain the policies of this model.
        """
        warn_of_unsaved_policies(self)
        parents = getattr(super(), "save_assets", None)  # a user's mixin may have one
        if parents is not None:
            parents(dir_path)

    def set_state_tree(self, state_tree: dict[str, Any]) -> None:
        """Set variables from a tree of values by path; OrbaxCheckpoint loads models by this.

        Warns:
            KerasMPWarning: If the model has no variables for some values.
        """
        super().set_state_tree(state_tree)
        warn_of_lost_values(self, state_tree)

    @classmethod
    def from_keras(cls, model: Any, *, auto_scale_loss: bool = True) -> Any:
        """Convert a stock Keras model to a kerasmp model in place, without building or compiling.

        Weights, the state of the optimizer and of metrics, and the arguments of `compile` stay. If
        the model is compiled and has float16 layers, its optimizer is wrapped in
        `LossScaleOptimizer`. Stock Keras's wrapper is replaced by kerasmp's, with its scale. A
        kerasmp model is returned unchanged.

        Args:
            model: A functional model, a `keras.Sequential`, or a user's subclass of `keras.Model`,
                built or not, compiled or not. It stays an instance of its class.
            auto_scale_loss: False leaves the optimizer unchanged.

        Returns:
            The same object.

        Raises:
            ArgumentTypeError: If `model` is not a Keras model.

        Example:

        >>> inputs = keras.Input((4,))
        >>> outputs = keras.layers.Dense(2, dtype="mixed_float16")(inputs)
        >>> model = keras.Model(inputs, outputs)
        >>> model.compile("sgd", "mse")
        >>> model = Model.from_keras(model)
        >>> isinstance(model, Model), type(model.optimizer).__name__
        (True, 'LossScaleOptimizer')
        """
        check_model(
            model, "be passed to from_keras", keras.Model, fix="Put layers into a keras.Sequential."
        )
        check_bool("auto_scale_loss", auto_scale_loss)
        if not isinstance(model, Model):
            object.__setattr__(model, "__class__", kerasmp_class(model))
            widen_activity_regularizers(model)
            CHECKED_LATE_LAYERS[model] = False
            adopt_optimizer(model, auto_scale_loss=auto_scale_loss)
        return model

    def compile(
        self, optimizer: Any = "rmsprop", *args: Any, auto_scale_loss: bool = True, **kwargs: Any
    ) -> None:
        """Configure training as `keras.Model.compile` does, with loss scaling for float16.

        Args:
            optimizer: A Keras optimizer or its name. It is wrapped in `LossScaleOptimizer()` if a
                layer computes in float16 and the optimizer does not scale the loss already.
            *args: As for `keras.Model.compile`.
            auto_scale_loss: False leaves the optimizer unchanged.
            **kwargs: As for `keras.Model.compile`.

        Warns:
            LossScaleWarning: If the optimizer is stock Keras's `LossScaleOptimizer`.
        """
        check_bool("auto_scale_loss", auto_scale_loss)
        optimizer = keras.optimizers.get(optimizer)
        self._auto_scale_loss = auto_scale_loss
        record_replacement(self)
        if needs_wrapper(self, optimizer):
            optimizer = LossScaleOptimizer(optimizer)
        warn_of_stock_wrapper(optimizer)
        # Wrapped above where needed; the parent would only look at the model's own policy.
        super().compile(optimizer, *args, auto_scale_loss=False, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's
        """Return the compiled step; wrap the optimizer first if layers came after `compile`.

        Raises:
            PolicyError: If the model was converted for inference only.

        Warns:
            LossScaleWarning: If float16 layers are trained and an attribute of the model holds an
                optimizer that does not scale the loss.
        """
        refuse_training(self)
        guard_replaced(self, Model)
        if needs_wrapper(self, self.optimizer):
            record_replacement(self)
            self.optimizer = wrapped(self.optimizer, self.trainable_variables)
            self.optimizer.build(self.trainable_variables)
            force = True  # a compiled step holds the optimizer from before
        warn_of_unscaled(self)
        return super().make_train_function(force)

    def train_step(self, *args: Any) -> Any:
        """Run one step. If it is skipped, only the optimizer's scale and counters change.

        A subclass may override this. Its step is guarded like this one, whether it calls
        `super().train_step` or not, as long as it applies its gradients by `self.optimizer`.

        Args:
            *args: `data`, and before it on JAX `state`, as for `keras.Model.train_step`.

        Warns:
            LossScaleWarning: If the first step created float16 layers and nothing scales the loss.
        """
        with keras_step(self):
            return super().train_step(*args)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step; see `keras.Model.train_on_batch`. If it is skipped, all results are NaN.

        They are the results of this batch alone, so there is no earlier average to return.
        """
        before = self._skipped_steps()
        logs = super().train_on_batch(*args, **kwargs)
        if self._skipped_steps() > before:
            return keras.tree.map_structure(lambda _: float("nan"), logs)
        return logs

    def _skipped_steps(self) -> int:
        counts = isinstance(self.optimizer, LossScaleOptimizer)
        return self.optimizer.skipped_steps if counts else 0

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,  # noqa: FBT001, FBT002
    ) -> Any:
        """Return the loss of float32 predictions; see `keras.Model.compute_loss`."""
        return super().compute_loss(x, y, y_pred, sample_weight, training=training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Update the metrics from float32 predictions; see `keras.Model.compute_metrics`."""
        return super().compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    @property
    def losses(self) -> list[Any]:
        """The extra losses of `add_loss` and regularizers, each in at least float32."""
        return [at_least_float32(loss) for loss in super().losses]

    def get_metrics_result(self) -> Any:
        """Return the results of the metrics; NaN if every step since the last reset was skipped.

        Keras returns 0 for an average over no step, which would look like a perfect loss. `fit`
        logs the results of the last batch then. A metric whose variables do not start with 0
        returns the result that it starts with.
        """
        results: dict[str, Any] = super().get_metrics_result()
        # A custom train step may never update the metrics, so there 0 need not mean no step.
        return nan_if_empty(self, results) if reports_nan(self) else results

    def get_compile_config(self) -> dict[str, Any]:
        """Return the serialized arguments of `compile`."""
        config: dict[str, Any] = super().get_compile_config()
        if not config:
            return config
        # The present optimizer, which may have been wrapped after `compile`.
        optimizer = keras.saving.serialize_keras_object(self.optimizer)
        return {**config, "optimizer": optimizer, "auto_scale_loss": self._auto_scale_loss}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile the model with what `get_compile_config` returned."""
        overrides_compile = type(self).compile is not Model.compile
        if overrides_compile:
            # Keras cannot know the arguments of a user's compile; the parent warns about it.
            super().compile_from_config(config)
            self._auto_scale_loss = config.get("auto_scale_loss", True)
            if self.compiled and needs_wrapper(self, self.optimizer):  # by its constructor
                self.optimizer = wrapped(self.optimizer, self.trainable_variables)
        else:
            self.compile(**keras.saving.deserialize_keras_object(config))
        if self._for_inference:
            self.optimizer = None  # as in the model that was saved
        elif overrides_compile and not has_saved_optimizer(self, config):
            return
        elif self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)


@keras.saving.register_keras_serializable(package="kerasmp")
class FunctionalModel(Model, Functional):
    """What `Model(inputs, outputs)` returns; see `Model`."""


@keras.saving.register_keras_serializable(package="kerasmp")
class Sequential(Model, keras.Sequential):
    """`keras.Sequential` for mixed precision; see `Model` for the differences.

    Args:
        layers: List of layers, or None to `add` them later.
        trainable: Whether the variables are trainable, default True.
        name: Name of the model.

    Example:

    >>> model = Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    >>> model.compile("sgd", "mse")
    >>> model.optimizer.loss_scale
    32768.0
    """

    def __init__(
        self,
        layers: list[Any] | None = None,
        trainable: bool = True,  # noqa: FBT001, FBT002 - Keras's signature
        name: str | None = None,
    ) -> None:
        super().__init__(layers=layers, trainable=trainable, name=name)


# Which stock model becomes which model of kerasmp.
_KERASMP_CLASSES: dict[Any, Any] = {
    keras.Sequential: Sequential,
    Functional: FunctionalModel,
    keras.Model: Model,
}


@registered
class Turned(Adopted, Model):
    """Loads the files of adopted models in a process that has not adopted any yet."""

    _kerasmp_class = Model


def kerasmp_class(model: Any) -> Any:
    """Return the class that a model gets when it is adopted; a kerasmp model keeps its class."""
    return type(model) if isinstance(model, Model) else adopted_class(model, _KERASMP_CLASSES)
