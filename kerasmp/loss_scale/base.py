"""What every loss-scale schedule is: a frozen value with a pure `init` and `update`."""

from __future__ import annotations

import abc
import dataclasses
import numbers
from typing import Any, ClassVar, Self

from keras import ops

from kerasmp.errors import ArgumentTypeError, LossScaleError, did_you_mean
from kerasmp.loss_scale import validation

State = dict[str, Any]


class LossScale(abc.ABC):
    """A schedule of the factor by which the loss is multiplied before the backward pass.

    A schedule holds settings only. Its state is a flat dict of scalars that the caller owns:
    `"scale"` (float32), `"step_counter"` (int, applied steps since the scale last moved or a
    step was skipped) and whatever a subclass adds. Subclasses are frozen dataclasses.

    Attributes:
        initial_scale: The scale of the first step.
        min_scale: No state holds a smaller scale.
        max_scale: No state holds a larger scale.

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
            # What an inherited one says was true of the inherited rule.
            cls.only_counts = LossScale.only_counts  # type: ignore[method-assign]  # of one class

    def init(self) -> State:
        """Return the state before the first step, as Python numbers.

        Floats become float32 variables and ints integer variables.

        Example:

        >>> FixedLossScale(1024).init()
        {'scale': 1024.0, 'step_counter': 0}
        """
        return {"scale": self.initial_scale, "step_counter": 0}

    @abc.abstractmethod
    def update(self, state: State, finite: Any) -> State:
        """Return the state after a step. Pure: written in `keras.ops`, the same on all backends.

        Args:
            state: The dict of `init`, holding scalar tensors or Python numbers.
            finite: Scalar bool, tensor or Python value: whether every gradient was finite.

        Returns:
            A new dict with the keys of `state`; scalar tensors.
        """

    def only_counts(self, state: State) -> Any:  # noqa: ARG002 - for subclasses
        """Return whether a good step would do nothing but add 1 to `step_counter`.

        Nearly every step is such a one. Where branches are cheap the optimizer then leaves `update`
        out, whose many small sums take longer than they look. A subclass with its own `update`
        inherits no answer but the default.

        Args:
            state: The dict of `init`, holding scalar tensors or Python numbers.

        Returns:
            Scalar bool, never true where `update` would do more; or None, the default, where
            telling costs no less than `update`.
        """
        return None

    def read(self, state: State) -> tuple[Any, State]:
        """Return the scale of a state within the bounds, and all of it as tensors; for `update`.

        Raises:
            LossScaleError: If the state lacks a key of `init`.
            ArgumentTypeError: If it is no dict.
        """
        validation.complete(self, state)
        tensors = {key: ops.convert_to_tensor(value) for key, value in state.items()}
        return self.bounded(state["scale"]), tensors

    def bounded(self, scale: Any) -> Any:
        """Return `scale` as a float32 scalar from `min_scale` to `max_scale`.

        For `update`: whatever was loaded or assigned from outside, NaN too, ends inside.
        """
        scale = ops.convert_to_tensor(scale, dtype="float32")
        # The comparison is false for NaN, which becomes the smallest scale.
        return ops.where(
            scale >= self.min_scale, ops.minimum(scale, self.max_scale), self.min_scale
        )

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments; `from_config` is the inverse.

        Raises:
            LossScaleError: If the subclass is no dataclass and has no `get_config` of its own.
        """
        try:
            fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is one
        except TypeError as error:
            raise LossScaleError(
                "The schedule cannot tell its settings, and so cannot be saved.",
                received=f"{type(self).__name__}, which is no dataclass",
                expected="a frozen dataclass",
                fix="Put @dataclasses.dataclass(frozen=True) above it, or give it a get_config.",
            ) from error
        return {field.name: getattr(self, field.name) for field in fields}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the schedule that `get_config` described.

        Raises:
            LossScaleError: If it holds what is no setting of the schedule.
            ArgumentTypeError: If it is no dict.
        """
        config = validation.mapping("The configuration", config)
        data: Any = cls
        known = [f.name for f in dataclasses.fields(data)] if _is_data(cls) else [*config]
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
            LossScaleError: If it is no number, or outside `min_scale` to `max_scale`.
        """
        number = validation.scale("loss_scale", value)
        if not self.min_scale <= number <= self.max_scale:
            raise LossScaleError(
                f"The scale is outside the bounds of {self!r}.",
                received=repr(value),
                expected=f"a number from {self.min_scale:g} to {self.max_scale:g}",
                fix="Choose a value inside, or a schedule with other bounds.",
            )
        return number


def _is_data(cls: type) -> bool:
    """Return whether a class itself is a dataclass, and takes its fields."""
    return "__dataclass_fields__" in vars(cls)


def either(condition: Any, yes: Any, no: Any) -> Any:
    """Return `yes` where the condition holds, else `no`; a Python bool chooses without a kernel."""
    if isinstance(condition, bool):
        return yes if condition else no
    return ops.where(condition, yes, no)


def resolve(spec: Any) -> LossScale:
    """Return the schedule that `spec` stands for.

    Args:
        spec: A `LossScale` (returned as it is), "dynamic", "fixed", a positive number (a fixed
            scale) or None (`NoLossScale()`).

    Raises:
        LossScaleError: For a string that names no schedule, or a number that is no scale.
        ArgumentTypeError: For any other type.

    Example:

    >>> resolve(1024)
    FixedLossScale(scale=1024.0)
    """
    from kerasmp.loss_scale.dynamic import DynamicLossScale
    from kerasmp.loss_scale.fixed import FixedLossScale, NoLossScale

    by_name: dict[str, type[LossScale]] = {"dynamic": DynamicLossScale, "fixed": FixedLossScale}
    if isinstance(spec, LossScale):
        return spec
    if spec is None:
        return NoLossScale()
    if isinstance(spec, str):
        if spec in by_name:
            return by_name[spec]()
        raise LossScaleError(
            "No loss-scale schedule has this name.",
            received=repr(spec),
            expected='"dynamic", "fixed", a positive number, a LossScale or None',
            fix=did_you_mean(spec, by_name) or 'The usual choice is "dynamic".',
        )
    if isinstance(spec, numbers.Real):
        return FixedLossScale(validation.scale("loss_scale", spec))
    raise ArgumentTypeError(
        "`loss_scale` has the wrong type.",
        received=f"{spec!r} of type {type(spec).__name__}",
        expected='"dynamic", "fixed", a positive number, a LossScale or None',
        fix="For own settings pass kerasmp.DynamicLossScale(...).",
    )
