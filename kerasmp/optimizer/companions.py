"""What users reach through the wrapper although it belongs to the optimizer inside."""

from __future__ import annotations

import contextlib
import functools
import numbers
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.optimizer.advancing import include_skips
from kerasmp.optimizer.arguments import INNER_ARGUMENTS
from kerasmp.optimizer.causes import Forgetful

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PLAIN = (numbers.Number, str, type(None))
# A compiled step holds its program. Loops that take turns, a GAN's say, need a few.
_KEPT_STEPS = 16


class InnerSettings:
    """The settings of the inner optimizer, as far as the wrapper passes them on or sends there.

    Attributes:
        inner_optimizer: The wrapped optimizer.
    """

    inner_optimizer: Any
    skips_advance_schedules: bool

    def __setattr__(self, name: str, value: Any) -> None:
        # The parent class has these settings too, and no step ever looks at them there.
        if name == "schedule" and getattr(self, "built", False):
            raise LossScaleError(
                "The state and the steps compiled so far belong to the schedule that there is.",
                received=f"optimizer.schedule = {value!r} after build",
                expected="another schedule before build",
                fix="Set optimizer.loss_scale, or make a new optimizer with loss_scale=<schedule>.",
            )
        if name == "loss_scale_factor" and "inner_optimizer" in self.__dict__:
            raise LossScaleError(
                "`loss_scale_factor` is the scale of an optimizer that is not wrapped.",
                received=f"optimizer.loss_scale_factor = {value!r}",
                expected=f"LossScaleOptimizer(inner_optimizer, loss_scale={value!r})",
                fix="On the optimizer inside it would divide every update once more.",
            )
        if name in INNER_ARGUMENTS and "inner_optimizer" in self.__dict__:
            raise LossScaleError(
                f"`{name}` belongs to the optimizer inside.",
                received=f"optimizer.{name} = {value!r}",
                expected=f"optimizer.inner_optimizer.{name} = {value!r}",
                fix="Set it there, before the first step: a compiled step keeps what it found.",
            )
        super().__setattr__(name, value)

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
        self.inner_optimizer.learning_rate = value
        if self.skips_advance_schedules:
            include_skips(self)

    @property
    def optimizers(self) -> Any:
        """The optimizers inside a `keras.optimizers.MultiOptimizer`.

        `LearningRateScheduler` and `ReduceLROnPlateau` look for them. With any other inner
        optimizer there is no such attribute.
        """
        return self.inner_optimizer.optimizers

    @property
    def accumulated_steps(self) -> int | None:
        """Applied steps that wait in the accumulators until their window is full.

        0 right after an update; None without `gradient_accumulation_steps`. A skipped step does
        not count, so that windows end later after it. In a `MultiOptimizer` whose optimizers have
        windows of different lengths, this is the largest number.
        """
        inside = getattr(self, "optimizers", [self.inner_optimizer])
        return max((_accumulated(o) for o in inside if o.gradient_accumulation_steps), default=None)


class CompiledSteps(Forgetful):
    """Eager steps that JAX has compiled, by what they depend on; the last few that were used."""

    def __init__(self) -> None:
        self._steps: dict[Any, Any] = {}

    def get(self, key: Any, compiled: Callable[[], Any]) -> Any:
        """Return the step for `key`, or what `compiled` returns, from now on.

        Args:
            key: What the step depends on.
            compiled: Called where there is no such step.
        """
        step = self._steps.pop(key, None) or compiled()
        self._steps[key] = step
        if len(self._steps) > _KEPT_STEPS:
            del self._steps[next(iter(self._steps))]
        return step


class _Itself:
    """Stands for a function or a schedule that may not be hashable: equal if it is the same one."""

    def __init__(self, value: Any) -> None:
        self._value = value  # and keeps it, so that no other one gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def kept_by_a_trace(optimizer: Any) -> tuple[Any, ...]:
    """Return the settings that a compiled step would keep for ever, to know when it is out of date.

    It cannot know all: what is changed inside of a dict, a schedule or an object of the user's own,
    and what a function reads that is called while a step is traced, a compiled step does not see.
    A new object in place of the old one, it sees.

    Args:
        optimizer: The inner optimizer.

    Returns:
        Numbers, names, lists of them, schedules and functions.
    """
    kept: list[Any] = []
    for inside in getattr(optimizer, "optimizers", [optimizer]):
        for name, value in vars(inside).items():
            if isinstance(value, _PLAIN):
                kept.append((name, value))
            elif isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value):
                kept.append((name, *value))
            elif callable(value):
                kept.append((name, _Itself(value)))
    return tuple(kept)


def rates_now(functions: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Return what each function gives as learning rate at this step.

    Args:
        functions: What `learning_rate_functions` returned.
    """
    rates = [function() for _, function in functions]
    return [rate.value if isinstance(rate, keras.Variable) else rate for rate in rates]


@contextlib.contextmanager
def rates_given(functions: Sequence[tuple[Any, Any]], rates: Sequence[Any]) -> Iterator[None]:
    """Let the optimizers use `rates` in place of what their functions would return.

    A compiled step is given them, and so serves every rate.

    Args:
        functions: What `learning_rate_functions` returned.
        rates: One for each.
    """
    for (inside, _), rate in zip(functions, rates, strict=True):
        inside.learning_rate = functools.partial(_returned, rate)
    try:
        yield
    finally:
        for inside, function in functions:
            inside.learning_rate = function


def _returned(value: Any) -> Any:
    return value


def _accumulated(optimizer: Any) -> int:
    # Not the property `iterations`, which counts full windows.
    steps = next(variable for variable in optimizer.variables if variable.name == "iteration")
    return int(ops.convert_to_numpy(steps.value)) % int(optimizer.gradient_accumulation_steps)
