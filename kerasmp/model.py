"""Keras models whose train step leaves no trace when the optimizer skips it."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import keras

from kerasmp import backend
from kerasmp.backend.keras_private import Functional, float16_layers, functional_init_arguments
from kerasmp.errors import LossScaleWarning
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.policy import global_policy
from kerasmp.policy.follow import RulesToFollow


@keras.saving.register_keras_serializable(package="kerasmp")
class Model(keras.Model):
    """`keras.Model` for mixed precision: a drop-in with the same three ways of use.

    It differs in six points. `compile` wraps the optimizer in `LossScaleOptimizer` as soon as
    any layer computes in float16, not only where the model's own policy is "mixed_float16". A
    skipped step leaves everything as if it had not been: BatchNormalization statistics, seeds,
    the averages of loss and metrics, every other non-trainable variable. float16 and bfloat16
    outputs reach the metrics in float32. Under a policy with `output=` the model's outputs have
    that dtype. Under one with class rules or `rules="safe"` its layers follow them. And
    `auto_scale_loss` is kept in saved files.

    Args:
        *args: As for `keras.Model`: `inputs, outputs` or nothing.
        **kwargs: As for `keras.Model`: `inputs`, `outputs`, `name`, `trainable`, `dtype`.

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
    _guards_steps = False
    _looked_for_late_layers = False

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
        policy = global_policy()
        self._output_dtype = policy.output_dtype
        self._rules = RulesToFollow(policy)
        self._rules.follow(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, in the `output` dtype of the policy that the model was made under."""
        self._rules.follow(self, *args)
        return self._in_output_dtype(super().__call__(*args, **kwargs))

    def stateless_call(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the outputs and the new state; see `keras.Model.stateless_call`."""
        self._rules.follow(self)
        outputs, *state = super().stateless_call(*args, **kwargs)
        return self._in_output_dtype(outputs), *state

    def _in_output_dtype(self, outputs: Any) -> Any:
        if self._output_dtype is None:
            return outputs
        return keras.tree.map_structure(functools.partial(_cast, dtype=self._output_dtype), outputs)

    def get_config(self) -> dict[str, Any]:
        """Return the parent's config, and the dtype of the outputs where a policy gave one."""
        config: dict[str, Any] = super().get_config()
        if self._output_dtype is not None:
            config = {**config, "output_dtype": self._output_dtype}
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Any:
        """Return the model that `get_config` described."""
        config = dict(config)
        output_dtype = config.pop("output_dtype", None)
        model = super().from_config(config, custom_objects=custom_objects)
        model._output_dtype = output_dtype  # noqa: SLF001 - not the global policy of this moment
        return model

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
        """
        self._auto_scale_loss = auto_scale_loss
        optimizer = keras.optimizers.get(optimizer)
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
        """Return the compiled step; wrap the optimizer first if layers came after `compile`."""
        if self._must_wrap(self.optimizer):
            self.optimizer = LossScaleOptimizer(self.optimizer)
            self.optimizer.build(self.trainable_variables)
            force = True  # a step that is compiled already holds the optimizer of before
        self._warn_of_optimizers_of_its_own()
        return super().make_train_function(force)

    def _warn_of_optimizers_of_its_own(self) -> None:
        """Warn of optimizers that a compile of the user's own has kept: nothing wraps those."""
        wrapper = keras.optimizers.LossScaleOptimizer
        own = {n: v for n, v in vars(self).items() if isinstance(v, keras.optimizers.Optimizer)}
        all_of_them = [self.optimizer, *own.values()]
        scaled = {id(o.inner_optimizer) for o in all_of_them if isinstance(o, wrapper)}
        scaled |= {id(o) for o in all_of_them if isinstance(o, wrapper)} | {id(self.optimizer)}
        plain = [name for name, value in own.items() if id(value) not in scaled]
        if plain and self._auto_scale_loss and float16_layers(self):
            warnings.warn(
                f"Nothing scales the loss of the model's own optimizers ({', '.join(plain)}), and "
                "layers compute in float16. Wrap each in kerasmp.LossScaleOptimizer, and call its "
                "scale_loss in the train step.",
                LossScaleWarning,
                stacklevel=3,
            )

    def train_step(self, *args: Any) -> Any:
        """Run one step; if it is skipped, only the optimizer's scale and counters change.

        Args:
            *args: `data`, and before it on JAX `state`, as for `keras.Model.train_step`.
        """
        if not isinstance(self.optimizer, LossScaleOptimizer):
            logs = super().train_step(*args)
            self._warn_if_too_late()
            return logs
        # Not within the step: the logs of one bad batch must not stop TerminateOnNaN's good run.
        self._guards_steps = False
        logs = backend.current().train_step(self, super().train_step, *args)
        self._guards_steps = True
        return logs

    def _warn_if_too_late(self) -> None:
        """Warn once if the first step has built float16 layers, as it does on TensorFlow."""
        if not self._looked_for_late_layers:
            self._looked_for_late_layers = True
            if self._must_wrap(self.optimizer):
                warnings.warn(
                    "Layers that compute in float16 were made during the first step, after "
                    "compile() had chosen the optimizer, and nothing scales the loss. Build the "
                    "model before compile(), or pass kerasmp.LossScaleOptimizer(optimizer) to it.",
                    LossScaleWarning,
                    stacklevel=2,
                )

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Update the metrics from float32 predictions; see `keras.Model.compute_metrics`."""
        return super().compute_metrics(
            x, y, keras.tree.map_structure(_at_least_float32, y_pred), sample_weight=sample_weight
        )

    def get_metrics_result(self) -> Any:
        """Return the metrics; all NaN where every step since the last reset was skipped.

        Keras averages over no step at all to 0, which would look like a perfect loss.
        """
        result = super().get_metrics_result()
        loss = next((m for m in self.metrics if m.name == "loss"), None)
        # A user's own train step may never touch the loss metric: only ours says what 0 means.
        if not self._guards_steps or not isinstance(loss, keras.metrics.Mean):
            return result
        nothing = keras.ops.equal(loss.count, 0)
        return keras.tree.map_structure(
            lambda value: keras.ops.where(nothing, float("nan"), value), result
        )

    def get_compile_config(self) -> dict[str, Any]:
        """Return what `compile` was called with, serialised."""
        config = super().get_compile_config()
        return {**config, "auto_scale_loss": self._auto_scale_loss} if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile with what `get_compile_config` returned."""
        if type(self).compile is not Model.compile:
            # A user's own compile takes arguments that Keras cannot know; the parent says so.
            super().compile_from_config(config)
            return
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
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


def _cast(tensor: Any, dtype: str) -> Any:
    is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))
    return keras.ops.cast(tensor, dtype) if is_float else tensor


def _at_least_float32(tensor: Any) -> Any:
    if keras.backend.standardize_dtype(tensor.dtype) in {"float16", "bfloat16"}:
        return keras.ops.cast(tensor, "float32")
    return tensor
