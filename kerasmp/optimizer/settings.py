"""Checks of the constructor's arguments, and of attributes that are set later."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.optimizer_internals import learning_rate_numbers
from kerasmp.errors import ArgumentTypeError, LossScaleError, LossScaleWarning, with_type
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale, resolve, validation
from kerasmp.optimizer.schedule_contract import check_schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

# Settings that belong to the inner optimizer, with their defaults. Older files of stock Keras hold
# these in the wrapper's configuration, where they never had an effect.
INNER_SETTINGS = {
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
# Attributes that cannot be replaced after `build`, with the way to get another one.
_FIXED_BY_BUILD = {
    "schedule": "Set optimizer.loss_scale, or create an optimizer with loss_scale=<schedule>.",
    "inner_optimizer": "Create a new LossScaleOptimizer around it.",
}
_SWITCHES = ("skips_advance_schedules", "fused")


def check_name(name: Any) -> None:
    """Raise a LossScaleError unless `name` is None or can be the name of an optimizer."""
    if name is not None and (not isinstance(name, str) or "/" in name):
        raise LossScaleError(
            "`name` cannot be an optimizer's name.",
            received=with_type(name),
            expected='a string without "/", or None',
            fix='Pass a name such as "optimizer", or leave it out.',
        )


def check_kwargs(kwargs: dict[str, Any]) -> None:
    """Raise a LossScaleError for arguments that the constructor does not have.

    Defaults of the inner optimizer's settings are accepted, since older files hold them.
    """
    unknown = [name for name in kwargs if name not in INNER_SETTINGS]
    if unknown:
        raise LossScaleError(
            f"LossScaleOptimizer does not support arguments: `{'`, `'.join(unknown)}`.",
            received=", ".join(f"{name}={kwargs[name]!r}" for name in unknown),
            expected="loss_scale, dynamic, initial_scale, dynamic_growth_steps, "
            "skips_advance_schedules, fused or name",
            fix="See the documentation of the class. Settings of an optimizer belong to "
            "`inner_optimizer`.",
        )
    for name, value in kwargs.items():
        if value != INNER_SETTINGS[name]:
            raise LossScaleError(
                f"LossScaleOptimizer does not support `{name}`.",
                received=f"{name}={value!r}",
                expected="nothing, or its default",
                fix=f"For a fixed scale pass loss_scale={value!r}; a factor "
                "on the `inner_optimizer` would divide every update once more."
                if name == "loss_scale_factor"
                else f"Set `{name}` on the `inner_optimizer`.",
            )


def resolve_schedule(
    loss_scale: Any,
    *,
    dynamic: bool | None,
    initial_scale: float | None,
    dynamic_growth_steps: int | None,
) -> LossScale:
    """Return the schedule for `loss_scale` and for the arguments of Keras 2 and 3, None if absent.

    Args:
        loss_scale: See `kerasmp.loss_scale.resolve`.
        dynamic: As in Keras 2: whether the scale is dynamic.
        initial_scale: As in Keras 2 and 3: the first scale, or the fixed one.
        dynamic_growth_steps: As in Keras 2 and 3: the growth interval.

    Raises:
        LossScaleError: If two arguments contradict each other, or one cannot work. It is also an
            ArgumentTypeError if `dynamic` is not a bool.
    """
    legacy: dict[str, Any] = {
        "dynamic": dynamic,
        "initial_scale": initial_scale,
        "dynamic_growth_steps": dynamic_growth_steps,
    }
    given = {name: value for name, value in legacy.items() if value is not None}
    if not given:
        return resolve(loss_scale)
    if loss_scale != "dynamic":
        raise LossScaleError(
            "The loss scale is given twice.",
            received=f"loss_scale={loss_scale!r} and {given}",
            expected="one of them",
            fix="Put all settings into loss_scale=kerasmp.DynamicLossScale(...).",
        )
    if validation.switch("dynamic", given.pop("dynamic", True)):
        names = {"initial_scale": "initial_scale", "dynamic_growth_steps": "growth_interval"}
        return DynamicLossScale(**{names[name]: value for name, value in given.items()})
    if dynamic_growth_steps is not None:
        raise LossScaleError(
            "A fixed scale does not grow.",
            received=f"dynamic=False, dynamic_growth_steps={dynamic_growth_steps!r}",
            expected="dynamic=True, or no dynamic_growth_steps",
            fix="Leave one of them out.",
        )
    return FixedLossScale() if initial_scale is None else FixedLossScale(initial_scale)


def resolve_inner(optimizer: Any) -> Any:
    """Return the inner optimizer, given as a Keras optimizer or its name.

    Raises:
        LossScaleError: For an unknown name, an optimizer that already scales the loss, or a
            learning rate that is inf or NaN.
        ArgumentTypeError: For anything else.
    """
    if isinstance(optimizer, str):
        try:
            optimizer = keras.optimizers.get(optimizer)
        except ValueError as error:
            raise LossScaleError(
                "No Keras optimizer has this name.",
                received=repr(optimizer),
                expected='a name such as "adam" or "sgd"',
                fix="You can also pass an optimizer object.",
            ) from error
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise LossScaleError(
            "The optimizer already scales the loss. Scaling twice would shrink every update.",
            received=f"a {type(optimizer).__module__}.{type(optimizer).__name__}",
            expected="a plain optimizer",
            fix="Wrap its `inner_optimizer` instead.",
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise _not_an_optimizer(optimizer, 'For example, LossScaleOptimizer("adam").')
    for rate in learning_rate_numbers(optimizer):
        check_learning_rate(rate)
    return optimizer


def _not_an_optimizer(value: Any, fix: str) -> ArgumentTypeError:
    return ArgumentTypeError(
        "`inner_optimizer` is not an optimizer.",
        received=with_type(value),
        expected="a keras.optimizers.Optimizer or, in the constructor, its name",
        fix=fix,
    )


def check_learning_rate(value: Any) -> None:
    """Raise a LossScaleError if a learning rate is inf, NaN, a string, None or a bool.

    Schedules, functions and tensors are not checked.
    """
    if isinstance(value, str | bytes | bool | np.bool_ | Mapping) or value is None:
        received = with_type(value)
    elif isinstance(value, numbers.Real) and not np.isfinite(float(value)):
        received = repr(value)
    else:
        return
    raise LossScaleError(
        "`learning_rate` has an invalid value.",
        received=received,
        expected="a finite number, or a keras.optimizers.schedules.LearningRateSchedule",
        fix="A usual first choice for Adam is 1e-3.",
    )


def validate_attribute(optimizer: Any, name: str, value: Any) -> Any:
    """Return the value to which an attribute of a `LossScaleOptimizer` is set, if it is valid.

    Raises:
        LossScaleError: For a schedule or an inner optimizer after `build`, for a switch that is
            not a bool, and for a setting of the inner optimizer, which has no effect here.
        ArgumentTypeError: For a schedule or an inner optimizer of the wrong type.
    """
    if name in _FIXED_BY_BUILD and getattr(optimizer, "built", False):
        part = name.replace("_", " ")
        raise LossScaleError(
            f"The {part} cannot be replaced after `build`, since the state and the compiled steps "
            "depend on it.",
            received=f"optimizer.{name} = {value!r} after build",
            expected=f"another {part} before build",
            fix=_FIXED_BY_BUILD[name],
        )
    if name == "schedule":
        check_schedule(value)
    if name in _SWITCHES:
        return validation.switch(name, value)
    if "inner_optimizer" not in vars(optimizer):  # the parent's constructor sets its own settings
        return value
    if name == "inner_optimizer":
        if isinstance(value, str):
            raise _not_an_optimizer(value, f"keras.optimizers.get({value!r}) returns one.")
        resolve_inner(value)
    if name == "loss_scale_factor":
        raise LossScaleError(
            "`loss_scale_factor` is the scale of an optimizer that is not wrapped.",
            received=f"optimizer.loss_scale_factor = {value!r}",
            expected=f"LossScaleOptimizer(inner_optimizer, loss_scale={value!r})",
            fix="On the inner optimizer, it would divide every update once more.",
        )
    if name in INNER_SETTINGS:
        raise LossScaleError(
            f"`{name}` is a setting of the inner optimizer.",
            received=f"optimizer.{name} = {value!r}",
            expected=f"optimizer.inner_optimizer.{name} = {value!r}",
            fix="Set it there before the first step, since a compiled step keeps its settings.",
        )
    return value


def refuse_second_scale(optimizers: Sequence[Any]) -> None:
    """Raise a LossScaleError if one of the inner optimizers has a `loss_scale_factor`."""
    for inside in optimizers:
        if inside.loss_scale_factor is not None:
            raise LossScaleError(
                "The inner optimizer has a loss scale too, which would make every update tiny.",
                received=f"{inside.name}.loss_scale_factor = {inside.loss_scale_factor!r}",
                expected="None",
                fix="Set it to None. For a fixed scale pass "
                f"loss_scale={inside.loss_scale_factor!r} to LossScaleOptimizer.",
            )


def drop_second_scale(optimizer: Any) -> None:
    """Set the `loss_scale_factor` of the inner optimizer to None, with a warning."""
    factor = optimizer.loss_scale_factor
    if factor is None:
        return
    warnings.warn(
        f"loss_scale_factor={factor} of the inner optimizer is dropped, since the gradients would "
        f"be scaled twice. For a fixed scale pass loss_scale={factor} here.",
        LossScaleWarning,
        stacklevel=3,
    )
    optimizer.loss_scale_factor = None
