"""What the constructor and a step take and refuse."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.errors import ArgumentTypeError, LossScaleError, LossScaleWarning
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

# What older files hold in the wrapper's config although it never had an effect there.
INNER_ARGUMENTS = {
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


def refuse(kwargs: dict[str, Any]) -> None:
    """Raise for every argument that does not belong to the wrapper, saying where it does.

    Args:
        kwargs: What the constructor got beyond its own arguments.

    Raises:
        LossScaleError: Unless all hold the defaults that older files store.
    """
    unknown = [name for name in kwargs if name not in INNER_ARGUMENTS]
    if unknown:
        raise LossScaleError(
            f"LossScaleOptimizer does not support arguments: `{'`, `'.join(unknown)}`.",
            received=", ".join(f"{name}={kwargs[name]!r}" for name in unknown),
            expected="loss_scale, dynamic, initial_scale, dynamic_growth_steps or name",
            fix="See the class for what it takes; an optimizer's own settings belong to "
            "`inner_optimizer`.",
        )
    for name, value in kwargs.items():
        if value != INNER_ARGUMENTS[name]:
            raise LossScaleError(
                f"LossScaleOptimizer does not take `{name}`.",
                received=f"{name}={value!r}",
                expected="nothing, or its default",
                fix=f"For a fixed scale pass loss_scale={value!r}; on the `inner_optimizer` the "
                "factor would divide every update once more."
                if name == "loss_scale_factor"
                else f"Set `{name}` on the `inner_optimizer`.",
            )


def names(variables: Sequence[Any]) -> str:
    """Return what to call variables in a message; TensorFlow's own ones have no path."""
    return ", ".join(str(getattr(v, "path", None) or getattr(v, "name", v)) for v in variables)


def refuse_no_gradient(grads: Sequence[Any]) -> None:
    """Raise if there are gradients and all of them are None.

    Args:
        grads: What `apply` was given.

    Raises:
        LossScaleError: If nothing could be applied.
    """
    if grads and all(g is None for g in grads):
        raise LossScaleError(
            "No gradients provided for any variable.",
            received=f"{len(grads)} gradients, all None",
            expected="a gradient for at least one variable",
            fix="Check that the loss depends on the trainable variables.",
        )


def variables_of(optimizer: Any, grads: Sequence[Any], given: Sequence[Any] | None) -> list[Any]:
    """Return the variables that gradients belong to.

    Args:
        optimizer: A `LossScaleOptimizer`.
        grads: What `apply` was given.
        given: The variables that it was given, if any.

    Raises:
        LossScaleError: If they do not match, nothing could be applied, or the optimizer does not
            know the variables.
    """
    if given is None and not optimizer.built:
        raise LossScaleError(
            "The optimizer does not know which variables the gradients belong to.",
            received="gradients alone, and an optimizer that is not built",
            expected="apply(grads, trainable_variables)",
            fix="Pass the variables, or call build(trainable_variables) first.",
        )
    variables = list(optimizer.target_variables if given is None else given)
    if len(variables) != len(grads):
        raise LossScaleError(
            "Gradients and variables do not match.",
            received=f"{len(grads)} gradients for {len(variables)} variables",
            expected="one gradient, or None, for each variable",
            fix="Pass both lists in the same order.",
        )
    refuse_no_gradient(grads)
    if optimizer.built:
        try:
            optimizer._check_variables_are_known(variables)  # noqa: SLF001 - see keras_private
        except ValueError as error:
            raise LossScaleError(
                "Unknown variable: the optimizer was built with others.",
                received=names(variables),
                expected=f"variables among {names(optimizer.target_variables)}",
                fix="Use one optimizer for each model, and build it with all variables that it "
                "shall ever update.",
            ) from error
    return variables


def refuse_stateless(optimizer: Any, state: Sequence[Any], grads: Any, weights: Any) -> None:
    """Raise unless a pure step can be made of these; see `LossScaleOptimizer.stateless_apply`.

    Args:
        optimizer: A `LossScaleOptimizer`.
        state: Values of its variables.
        grads: Gradients.
        weights: Values of the variables that it was built with.

    Raises:
        LossScaleError: If it is not built, or numbers of values differ.
    """
    if not optimizer.built:
        raise LossScaleError(
            "stateless_apply needs the optimizer's variables.",
            received="an optimizer that is not built",
            expected="a built one",
            fix="Call optimizer.build(model.trainable_variables) first.",
        )
    number = len(optimizer.target_variables)
    for what, values, expected in (
        ("optimizer_variables", state, len(optimizer.variables)),
        ("trainable_variables", weights, number),
        ("grads", grads, number),
    ):
        if len(values) != expected:
            raise LossScaleError(
                f"`{what}` does not match the built optimizer.",
                received=f"{len(values)} values",
                expected=f"{expected}",
                fix="Pass one value for each variable, in the order they were built with.",
            )
    refuse_no_gradient(grads)


def refuse_setting(optimizer: Any, name: str, value: Any) -> None:
    """Raise if an attribute of the wrapper is set that no step would look at there.

    Args:
        optimizer: A `LossScaleOptimizer`.
        name: The attribute.
        value: What it is set to.

    Raises:
        LossScaleError: For a schedule after `build`, and for what belongs to the inner optimizer.
    """
    if name == "schedule" and getattr(optimizer, "built", False):
        raise LossScaleError(
            "The state and the steps compiled so far belong to the schedule that there is.",
            received=f"optimizer.schedule = {value!r} after build",
            expected="another schedule before build",
            fix="Set optimizer.loss_scale, or make a new optimizer with loss_scale=<schedule>.",
        )
    if "inner_optimizer" not in vars(optimizer):  # the parent class has these settings too
        return
    if name == "loss_scale_factor":
        raise LossScaleError(
            "`loss_scale_factor` is the scale of an optimizer that is not wrapped.",
            received=f"optimizer.loss_scale_factor = {value!r}",
            expected=f"LossScaleOptimizer(inner_optimizer, loss_scale={value!r})",
            fix="On the optimizer inside it would divide every update once more.",
        )
    if name in INNER_ARGUMENTS:
        raise LossScaleError(
            f"`{name}` belongs to the optimizer inside.",
            received=f"optimizer.{name} = {value!r}",
            expected=f"optimizer.inner_optimizer.{name} = {value!r}",
            fix="Set it there, before the first step: a compiled step keeps what it found.",
        )


def refuse_second_scale(optimizers: Sequence[Any]) -> None:
    """Raise if the inner optimizer, or one inside of it, would divide by a scale of its own.

    Args:
        optimizers: The inner optimizer, and those inside of it.

    Raises:
        LossScaleError: If its `loss_scale_factor` is set.
    """
    for inside in optimizers:
        if inside.loss_scale_factor is not None:
            raise LossScaleError(
                "The inner optimizer scales too, which would make every update tiny.",
                received=f"{inside.name}.loss_scale_factor = {inside.loss_scale_factor!r}",
                expected="None",
                fix="Set it to None. For a fixed scale pass "
                f"loss_scale={inside.loss_scale_factor!r} to LossScaleOptimizer.",
            )


def drop_second_scale(optimizer: Any) -> None:
    """Take a `loss_scale_factor` away from the inner optimizer, with a warning."""
    factor = optimizer.loss_scale_factor
    if factor is None:
        return
    warnings.warn(
        f"The inner optimizer's loss_scale_factor={factor} is dropped, the gradients would be "
        f"scaled twice. For a fixed scale pass loss_scale={factor} here.",
        LossScaleWarning,
        stacklevel=3,
    )
    optimizer.loss_scale_factor = None


def inner(optimizer: Any) -> Any:
    """Return the optimizer that the first argument stands for.

    Args:
        optimizer: A Keras optimizer or its name.

    Raises:
        LossScaleError: For an unknown name, or an optimizer that scales already.
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
                fix="Or pass an optimizer object.",
            ) from error
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise LossScaleError(
            "The optimizer scales the loss already; twice would shrink every update.",
            received=f"a {type(optimizer).__module__}.{type(optimizer).__name__}",
            expected="a plain optimizer",
            fix="Wrap its `inner_optimizer` instead.",
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ArgumentTypeError(
            "`inner_optimizer` is no optimizer.",
            received=f"{optimizer!r} of type {type(optimizer).__name__}",
            expected="a keras.optimizers.Optimizer or its name",
            fix='For example LossScaleOptimizer("adam").',
        )
    return optimizer


def schedule(
    loss_scale: Any,
    *,
    dynamic: bool | None,
    initial_scale: float | None,
    growth_steps: int | None,
) -> LossScale:
    """Resolve `loss_scale` together with the arguments that Keras 2 and 3 call by other names.

    Args:
        loss_scale: See `kerasmp.loss_scale.resolve`.
        dynamic: Keras 2's switch between a fixed and a dynamic scale; None if not given.
        initial_scale: Keras's name for the first, or fixed, scale; None if not given.
        growth_steps: Keras's `dynamic_growth_steps`; None if not given.

    Raises:
        LossScaleError: If two arguments contradict each other, or one cannot work.
        ArgumentTypeError: If `dynamic` is no bool.
    """
    legacy = {
        "dynamic": dynamic,
        "initial_scale": initial_scale,
        "dynamic_growth_steps": growth_steps,
    }
    given = {name: value for name, value in legacy.items() if value is not None}
    if not given:
        return resolve(loss_scale)
    if loss_scale != "dynamic":
        raise LossScaleError(
            "The scale is given twice.",
            received=f"loss_scale={loss_scale!r} and {given}",
            expected="one of them",
            fix="Put everything into loss_scale=kerasmp.DynamicLossScale(...).",
        )
    if dynamic is not None and not isinstance(dynamic, bool | np.bool_):
        raise ArgumentTypeError(
            "`dynamic` is a switch.",
            received=f"{dynamic!r} of type {type(dynamic).__name__}",
            expected="True or False",
            fix="For a fixed scale pass dynamic=False, or loss_scale=<number>.",
        )
    if dynamic is not None and not dynamic:
        if growth_steps is not None:
            raise LossScaleError(
                "A fixed scale does not grow.",
                received=f"dynamic=False, dynamic_growth_steps={growth_steps!r}",
                expected="dynamic=True, or no dynamic_growth_steps",
                fix="Leave one of them out.",
            )
        return FixedLossScale() if initial_scale is None else FixedLossScale(initial_scale)
    settings: dict[str, Any] = {}
    if initial_scale is not None:
        settings["initial_scale"] = initial_scale
    if growth_steps is not None:
        settings["growth_interval"] = growth_steps
    return DynamicLossScale(**settings)
