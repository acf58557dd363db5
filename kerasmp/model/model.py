"""Keras models whose train step leaves no trace when the optimizer skips it."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.by_identity import ByIdentity
from kerasmp.backend.keras_internals import Functional, float16_layers, functional_init_arguments
from kerasmp.errors import ArgumentTypeError, LossScaleWarning, PolicyError, check_bool
from kerasmp.model.adopt import class_between, loader, ours_for
from kerasmp.model.find_optimizers import is_of_file, warn_of_unscaled
from kerasmp.model.float32 import at_least_float32, cast, widen_activity_regularizers
from kerasmp.model.guards import guard_late, is_guarded, with_guards
from kerasmp.model.hints import dtype_hints
from kerasmp.model.inference import refuse_training
from kerasmp.model.serialization import take_up, warn_if_untold, warn_of_no_variables
from kerasmp.model.train_step import kerass_own, nan_of_nothing, no_step_is_nan
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.optimizer.scaled_losses import note_successor
from kerasmp.policy import Policy, global_policy
from kerasmp.policy.follow import RulesToFollow

if TYPE_CHECKING:
    from kerasmp.model.serialization import LayersToFollow

# Not an attribute of the model: a step sets none, since another thread may be using it.
_LOOKED_FOR_LATE_LAYERS: ByIdentity[bool] = ByIdentity()


@keras.saving.register_keras_serializable(package="kerasmp")
@with_guards
class Model(keras.Model):
    """`keras.Model` for mixed precision: a drop-in with the same three ways of use.

    It differs in six points. `compile` wraps the optimizer in `LossScaleOptimizer` as soon as
    any layer computes in float16, not only where the model's own policy is "mixed_float16". A
    skipped step leaves everything as if it had not been: BatchNormalization statistics, seeds,
    the averages of loss and metrics, every other non-trainable variable; also where `train_step`
    is the user's own. float16 and bfloat16 outputs reach losses and metrics in float32, and extra
    losses (`add_loss`, activity regularizers) are added up in it. An error of mixed dtypes comes
    with a hint. Under a policy with `output=` the model's outputs have that dtype, and under one
    with class rules or `rules="safe"` its layers follow them. And `auto_scale_loss` is kept in
    saved files.

    Args:
        *args: As for `keras.Model`: `inputs, outputs` or nothing.
        **kwargs: As for `keras.Model`: `inputs`, `outputs`, `name`, `trainable`, `dtype`.

    Raises:
        PolicyError: If rules of the global policy disagree on a layer, or would change the dtype
            of weights that exist. A subclass, whose layers come later, raises it when called.

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
    _keeps_layer_policies = False  # whether files say the policy of each layer, inner ones too
    # None: those of a model that was turned into ours.
    _rules: RulesToFollow | LayersToFollow = RulesToFollow(Policy("float32"))
    _for_inference = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Guard what a user's subclass, or a mixin in it, has of its own."""
        super().__init_subclass__(**kwargs)
        with_guards(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - the class says it
        # As keras.Model does. A subclass is told apart in __init__, by what it passes on.
        if cls is Model and functional_init_arguments(args, kwargs):
            return super().__new__(FunctionalModel, *args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if functional_init_arguments(args, kwargs) and not isinstance(
            self, Functional | keras.Sequential
        ):
            # keras.Model would rewrite the bases of our class here, for all models at once.
            cls: Any = type(self)
            object.__setattr__(self, "__class__", _functional_subclass(cls))
        super().__init__(*args, **kwargs)
        try:
            policy = global_policy()
        except PolicyError:  # one of the user's own, of which Keras follows all
            policy = Policy("float32")
        self._output_dtype = policy.output_dtype
        self._rules = RulesToFollow(policy)
        self._keeps_layer_policies = self._rules.any
        self._take_up_layers()

    def _take_up_layers(self, *inputs: Any) -> None:
        """Let layers that have come since follow the rules, and their penalties see float32.

        In a call of a model that is built this finds none, and sets nothing.
        """
        self._rules.follow(self, *inputs)
        widen_activity_regularizers(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; when Keras says that the model is built, take up its layers."""
        is_news = name == "built" and value and not getattr(self, "built", False)
        super().__setattr__(name, value)
        if is_news:
            widen_activity_regularizers(self)
        if is_guarded(name):
            guard_late(self, Model)

    @backend.as_written
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, in the `output` dtype of the policy that the model was made under."""
        self._take_up_layers(*args)
        with dtype_hints():
            return self._in_output_dtype(super().__call__(*args, **kwargs))

    def stateless_call(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the outputs and the new state; see `keras.Model.stateless_call`."""
        self._take_up_layers()
        with dtype_hints():
            outputs, *state = super().stateless_call(*args, **kwargs)
        return self._in_output_dtype(outputs), *state

    def _in_output_dtype(self, outputs: Any) -> Any:
        if self._output_dtype is None:
            return outputs
        return keras.tree.map_structure(functools.partial(cast, dtype=self._output_dtype), outputs)

    # What is around these three, and around those of a subclass, keeps what Keras would lose.
    def get_config(self) -> dict[str, Any]:
        """Return the parent's config, and what else a model of ours has to keep."""
        return dict(super().get_config())

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Any:
        """Return the model that `get_config` described."""
        model = super().from_config(config, custom_objects=custom_objects)
        take_up(model, {})  # what a file does not say is not that of the policy of now
        return model

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Build the model; layers that come only now follow what the file says of them."""
        super().build_from_config(config)

    def save_assets(self, dir_path: str) -> None:
        """Save nothing; `save` asks for it, and `save_weights` does not.

        Warns:
            PolicyWarning: If the file tells nothing of the policies of this model.
        """
        warn_if_untold(self)
        parents = getattr(super(), "save_assets", None)  # a mixin of the user's may have one
        if parents is not None:
            parents(dir_path)

    def set_state_tree(self, state_tree: dict[str, Any]) -> None:
        """Give variables the values of a tree by their paths; OrbaxCheckpoint loads so.

        Warns:
            KerasMPWarning: If there is no variable for some of them.
        """
        super().set_state_tree(state_tree)
        warn_of_no_variables(self, state_tree)

    @classmethod
    def from_keras(cls, model: Any, *, auto_scale_loss: bool = True) -> Any:
        """Turn a stock Keras model into one of ours, in place: nothing is built or compiled again.

        Weights, the state of the optimizer and of metrics, and what `compile` was given stay. If
        the model is compiled and has float16 layers, its optimizer is wrapped in
        `LossScaleOptimizer`; stock Keras's wrapper is replaced by ours, with its scale. A model
        of ours is returned as it is.

        Args:
            model: A functional model, a `keras.Sequential`, or a user's subclass of `keras.Model`,
                built or not, compiled or not. It keeps being an instance of its class.
            auto_scale_loss: False leaves the optimizer as it is.

        Returns:
            The same object.

        Raises:
            ArgumentTypeError: If it is no Keras model.

        Example:

        >>> inputs = keras.Input((4,))
        >>> outputs = keras.layers.Dense(2, dtype="mixed_float16")(inputs)
        >>> model = keras.Model(inputs, outputs)
        >>> model.compile("sgd", "mse")
        >>> model = Model.from_keras(model)
        >>> isinstance(model, Model), type(model.optimizer).__name__
        (True, 'LossScaleOptimizer')
        """
        if not isinstance(model, keras.Model):
            raise ArgumentTypeError(
                "from_keras turns Keras models.",
                received=f"{model!r} of type {type(model).__name__}",
                expected="a keras.Model",
                fix="Put layers into a keras.Sequential first.",
            )
        check_bool("auto_scale_loss", auto_scale_loss)
        if not isinstance(model, Model):
            object.__setattr__(model, "__class__", class_of_ours(model))
            widen_activity_regularizers(model)
            _LOOKED_FOR_LATE_LAYERS[model] = False
            model._scale_as_turned(auto_scale_loss)  # noqa: SLF001 - one of ours, now
        return model

    def _scale_as_turned(self, auto_scale_loss: bool) -> None:  # noqa: FBT001 - one caller
        self._auto_scale_loss = auto_scale_loss
        note_successor(self)
        if self._gets_our_optimizer():
            self.optimizer = ours_for(self.optimizer, self.trainable_variables)
        # What is compiled holds the step and the optimizer of before.
        self.train_function = self.test_function = self.predict_function = None

    def _gets_our_optimizer(self) -> bool:
        """Return whether a model, turned now, is to have ours for the optimizer that it has."""
        stock = keras.optimizers.LossScaleOptimizer
        return bool(self.compiled) and (
            self._must_wrap(self.optimizer)
            or (self._auto_scale_loss and type(self.optimizer) is stock)
        )

    def compile(
        self, optimizer: Any = "rmsprop", *args: Any, auto_scale_loss: bool = True, **kwargs: Any
    ) -> None:
        """Configure training as `keras.Model.compile`, scaling the loss for float16.

        Args:
            optimizer: A Keras optimizer or its name. It is wrapped in `LossScaleOptimizer()` if a
                layer computes in float16 and it does not scale the loss already.
            *args: As for `keras.Model.compile`.
            auto_scale_loss: False leaves the optimizer as it is.
            **kwargs: As for `keras.Model.compile`.

        Warns:
            LossScaleWarning: If it is given stock Keras's `LossScaleOptimizer`.
        """
        check_bool("auto_scale_loss", auto_scale_loss)
        optimizer = keras.optimizers.get(optimizer)
        self._auto_scale_loss = auto_scale_loss
        note_successor(self)
        if self._must_wrap(optimizer):
            optimizer = LossScaleOptimizer(optimizer)
        elif isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and not isinstance(
            optimizer, LossScaleOptimizer
        ):
            warnings.warn(
                "Stock Keras's LossScaleOptimizer does not tell which steps it skips, so they "
                "leave their traces in BatchNormalization and metrics. Pass "
                "kerasmp.LossScaleOptimizer(optimizer.inner_optimizer) instead.",
                LossScaleWarning,
                stacklevel=2,
            )
        # Wrapped already where it must be; the parent would go by the model's policy alone.
        super().compile(optimizer, *args, auto_scale_loss=False, **kwargs)

    def _must_wrap(self, optimizer: Any) -> bool:
        return (
            self._auto_scale_loss
            and optimizer is not None
            and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
            and bool(float16_layers(self))
        )

    def make_train_function(self, force: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's
        """Return the compiled step; wrap the optimizer first if layers came after `compile`.

        Raises:
            PolicyError: If the model was converted for inference alone.

        Warns:
            LossScaleWarning: If layers train in float16 and the model keeps optimizers in
                attributes that scale no loss.
        """
        refuse_training(self)
        guard_late(self, Model)
        if self._must_wrap(self.optimizer):
            note_successor(self)
            self.optimizer = ours_for(self.optimizer, self.trainable_variables)
            self.optimizer.build(self.trainable_variables)
            force = True  # a step that is compiled already holds the optimizer of before
        warn_of_unscaled(self)
        return super().make_train_function(force)

    def train_step(self, *args: Any) -> Any:
        """Run one step; if it is skipped, only the optimizer's scale and counters change.

        A subclass may replace it. Its own step is guarded as this one is, whether it calls
        `super().train_step` or not, as long as it applies its gradients by `self.optimizer`.

        Args:
            *args: `data`, and before it on JAX `state`, as for `keras.Model.train_step`.

        Warns:
            LossScaleWarning: If the first step has made float16 layers and nothing scales its loss.
        """
        with kerass_own(self):
            return super().train_step(*args)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step; see `keras.Model.train_on_batch`. All NaN where it was skipped.

        Its metrics are those of this batch alone, and there is nothing to average.
        """
        before = self._skipped_steps()
        logs = super().train_on_batch(*args, **kwargs)
        if self._skipped_steps() > before:
            return keras.tree.map_structure(lambda _: float("nan"), logs)
        return logs

    def _skipped_steps(self) -> int:
        ours = isinstance(self.optimizer, LossScaleOptimizer)
        return self.optimizer.skipped_steps if ours else 0

    def _warn_if_too_late(self) -> None:
        """Warn once if the first step has built float16 layers, as it does on TensorFlow."""
        if not _LOOKED_FOR_LATE_LAYERS.get(self):
            _LOOKED_FOR_LATE_LAYERS[self] = True
            if self._must_wrap(self.optimizer):
                warnings.warn(
                    "Layers that compute in float16 were made during the first step, after "
                    "compile() had chosen the optimizer, and nothing scales the loss. Build the "
                    "model before compile(), or pass kerasmp.LossScaleOptimizer(optimizer) to it.",
                    LossScaleWarning,
                    stacklevel=2,
                )

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
        """The extra losses of `add_loss` and regularizers, each at least in float32."""
        return [at_least_float32(loss) for loss in super().losses]

    def get_metrics_result(self) -> Any:
        """Return the metrics; NaN where every step since the last reset was skipped.

        Keras averages over no step at all to 0, which would look like a perfect loss. `fit` says
        what the last step has said. A metric whose variables do not start with 0 has the result
        that it starts with.
        """
        results: dict[str, Any] = super().get_metrics_result()
        # A user's own train step may never touch the metrics: only ours says what 0 means.
        return nan_of_nothing(self, results) if no_step_is_nan(self) else results

    def get_compile_config(self) -> dict[str, Any]:
        """Return what `compile` was called with, serialised."""
        config: dict[str, Any] = super().get_compile_config()
        if not config:
            return config
        # The optimizer of now, which may have been wrapped after `compile`.
        optimizer = keras.saving.serialize_keras_object(self.optimizer)
        return {**config, "optimizer": optimizer, "auto_scale_loss": self._auto_scale_loss}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile with what `get_compile_config` returned."""
        own = type(self).compile is not Model.compile
        if own:
            # A user's own compile takes arguments that Keras cannot know; the parent says so.
            super().compile_from_config(config)
            self._auto_scale_loss = config.get("auto_scale_loss", True)
            if self.compiled and self._must_wrap(self.optimizer):  # by its constructor
                self.optimizer = ours_for(self.optimizer, self.trainable_variables)
        else:
            self.compile(**keras.saving.deserialize_keras_object(config))
        if self._for_inference:
            self.optimizer = None  # as in the model that was saved
        elif own and not is_of_file(self, config):
            return
        elif self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)


@keras.saving.register_keras_serializable(package="kerasmp")
class FunctionalModel(Model, Functional):
    """What `Model(inputs, outputs)` returns; see `Model`."""


@keras.saving.register_keras_serializable(package="kerasmp")
class Sequential(Model, keras.Sequential):
    """`keras.Sequential` for mixed precision; see `Model` for what differs.

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


@functools.cache
def _functional_subclass(cls: Any) -> Any:
    """Return `cls` with Functional among its bases, known to Keras's saving by the same name."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    functional = type(cls)(cls.__name__, (cls, FunctionalModel), names)
    package, separator, name = keras.saving.get_registered_name(cls).partition(">")
    if separator:
        for registered in (functional, cls):
            keras.saving.register_keras_serializable(package, name)(registered)
    return functional


def class_of_ours(model: Any) -> Any:
    """Return the class that makes a stock model one of ours; of one of ours, its own."""
    if isinstance(model, Model):
        return type(model)
    theirs: Any = type(model)
    ours: Any = Model
    if isinstance(model, keras.Sequential):
        ours = Sequential
    elif isinstance(model, Functional):
        ours = FunctionalModel
    stock = theirs in {Functional, keras.Sequential, keras.Model}
    return ours if stock else class_between(theirs, ours, Model.from_keras)


loader(Model.from_keras)  # files of turned models load where none was turned yet
