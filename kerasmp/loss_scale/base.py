"""The base class of all loss-scale schedules."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Self

from keras import ops

from kerasmp.errors import LossScaleError, did_you_mean
from kerasmp.loss_scale import validation

State = dict[str, Any]


class LossScale(abc.ABC):
    """Base class of the schedules, which choose the factor that multiplies the loss at each step.

    A schedule is a frozen dataclass that holds settings only. Its state is a flat dict of scalars
    that the caller owns: `"scale"` (float32), `"step_counter"` (int, applied steps since the scale
    last moved or a step was skipped), and what a subclass adds.

    Attributes:
        initial_scale: The scale of the first step.
        min_scale: The smallest scale that a state may hold.
        max_scale: The largest scale that a state may hold.
        measures: What `update` needs to know about the gradients, as names of its arguments:
            "gradient_max" or "underflow". Empty by default.

    Example:

    >>> @keras.saving.register_keras_serializable(package="my_project")
    ... @dataclasses.dataclass(frozen=True)
    ... class Constant(LossScale):
    ...     initial_scale: float = 8.0
    ...     min_scale: float = 1.0
    ...     max_scale: float = 2.0**24
    ...
    ...     def update(self, state, finite):
    ...         return {**state, "scale": self.bounded(state["scale"])}
    >>> Constant().init()["scale"], Constant(16.0).get_config()["initial_scale"]
    (8.0, 16.0)
    """

    measures: ClassVar[tuple[str, ...]] = ()

    initial_scale: float
    min_scale: float
    max_scale: float

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in vars(cls) and "only_counts" not in vars(cls):
            # An inherited `only_counts` is about the inherited rule.
            cls.only_counts = LossScale.only_counts  # type: ignore[method-assign]  # of this class only

    def init(self) -> State:
        """Return the state before the first step, as Python numbers.

        The optimizer keeps a float in a float32 variable, and an int in an integer variable.

        Example:

        >>> FixedLossScale(1024).init()
        {'scale': 1024.0, 'step_counter': 0}
        """
        return {"scale": self.initial_scale, "step_counter": 0}

    @abc.abstractmethod
    def update(self, state: State, finite: Any) -> State:
        """Return the state after a step.

        This is a pure function, written with `keras.ops` for all backends.

        Args:
            state: A dict with the keys of `init` that holds scalar tensors or Python numbers.
            finite: Whether every gradient was finite, as a scalar tensor or a bool.

        Returns:
            A new dict of scalar tensors, with the same keys.
        """

    def only_counts(self, state: State) -> Any:  # noqa: ARG002 - for subclasses
        """Return whether a good step would only add 1 to `step_counter`.

        Nearly every step does. Where branches are cheap, the optimizer then does not call `update`,
        whose many small kernels take time. A subclass with its own `update` always starts with this
        default, even if its parent has another answer.

        Args:
            state: A dict with the keys of `init` that holds scalar tensors or Python numbers.

        Returns:
            A scalar bool that is never true if `update` would do more. The default is None: the
            answer would cost as much as `update`.
        """
        return None

    def read(self, state: State) -> tuple[Any, State]:
        """Return the scale of a state, brought within the bounds, and the state as tensors.

        The `update` of a subclass can start with it.

        Raises:
            LossScaleError: If the state lacks a key of `init`.
            ArgumentTypeError: If the state is not a dict.
        """
        validation.complete(self, state)
        tensors = {key: ops.convert_to_tensor(value) for key, value in state.items()}
        return self.bounded(state["scale"]), tensors

    def bounded(self, scale: Any) -> Any:
        """Return `scale` as a float32 scalar from `min_scale` to `max_scale`.

        A scale that was loaded or assigned may lie outside, or be NaN.
        """
        scale = ops.convert_to_tensor(scale, dtype="float32")
        # The comparison is False for NaN, which becomes the smallest scale.
        return ops.where(
            scale >= self.min_scale, ops.minimum(scale, self.max_scale), self.min_scale
        )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor. `from_config` is the inverse.

        Raises:
            LossScaleError: If the subclass is not a dataclass and has no `get_config` of its own.
        """
        try:
            fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is one
        except TypeError as error:
            raise LossScaleError(
                "The settings of the schedule are not known, so it cannot be saved.",
                received=f"{type(self).__name__}, which is not a dataclass",
                expected="a frozen dataclass",
                fix="Decorate it with @dataclasses.dataclass(frozen=True), or define get_config.",
            ) from error
        return {field.name: getattr(self, field.name) for field in fields}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the schedule that `get_config` described.

        Raises:
            LossScaleError: If `config` has keys that are not settings of the schedule.
            ArgumentTypeError: If `config` is not a dict.
        """
        config = validation.mapping("The configuration", config)
        # Only a class that is itself a dataclass has a constructor that takes its fields.
        own_fields = "__dataclass_fields__" in vars(cls)
        known = [f.name for f in dataclasses.fields(cls)] if own_fields else [*config]  # type: ignore[arg-type]  # it has fields
        unknown = [name for name in config if name not in known]
        if unknown:
            raise LossScaleError(
                f"{cls.__name__} has no such settings.",
                received=", ".join(map(repr, unknown)),
                expected=f"some of {', '.join(known)}",
                fix=did_you_mean(str(unknown[0]), known) or "get_config() returns what it takes.",
            )
        return cls(**config)

    def check(self, value: Any) -> float:
        """Return `value` as a float if a state may hold it as its scale.

        Raises:
            LossScaleError: If `value` is not a number from `min_scale` to `max_scale`.
        """
        number = validation.scale("loss_scale", value)
        if not self.min_scale <= number <= self.max_scale:
            raise LossScaleError(
                f"The scale is outside the bounds of {self!r}.",
                received=repr(value),
                expected=f"a number from {self.min_scale:g} to {self.max_scale:g}",
                fix="Choose a value inside the bounds, or a schedule with other bounds.",
            )
        return number


def either(condition: Any, yes: Any, no: Any) -> Any:
    """Return `ops.where(condition, yes, no)`; no kernel runs if the condition is a Python bool."""
    if isinstance(condition, bool):
        return yes if condition else no
    return ops.where(condition, yes, no)
