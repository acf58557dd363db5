"""What the constructor and a step take and refuse."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from kerasmp import backend
from kerasmp.backend.keras_internals import are_all_of, learning_rate_numbers
from kerasmp.backend.protocol import name_of
from kerasmp.errors import ArgumentTypeError, LossScaleError, LossScaleWarning
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, LossScale, resolve, validation
from kerasmp.optimizer.gradient_statistics import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN = 100  # characters of a value in a message
_PARTS = {"schedule": "schedule", "inner_optimizer": "inner optimizer"}
_SWITCHES = ("skips_advance_schedules", "fused")

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


def refuse_name(name: Any) -> None:
    """Raise for what can be no optimizer's name.

    Args:
        name: What the constructor got.

    Raises:
        LossScaleError: Unless it is None or a text without "/".
    """
    if name is not None and (not isinstance(name, str) or "/" in name):
        raise LossScaleError(
            "`name` cannot be an optimizer's name.",
            received=f"{name!r} of type {type(name).__name__}",
            expected='a text without "/", or None',
            fix='Pass one such as "optimizer", or leave it out.',
        )


def names(variables: Sequence[Any]) -> str:
    """Return what to call variables in a message; TensorFlow's own ones have no path."""
    return ", ".join(str(getattr(v, "path", None) or getattr(v, "name", v)) for v in variables)


def listed(what: str, values: Any) -> list[Any]:
    """Return what stands for a list as one.

    Args:
        what: What it is, for the message.
        values: A list, or anything that gives one value after the other.

    Raises:
        ArgumentTypeError: If it does not; a dict does, but gives its keys.
    """
    try:
        if isinstance(values, str | bytes | Mapping | keras.Variable):
            raise TypeError  # noqa: TRY301 - as all else that is no list
        return list(values)
    except TypeError as error:
        raise ArgumentTypeError(
            f"`{what}` is no list.",
            received=f"{_shown(values)} of type {type(values).__name__}",
            expected="a list",
            fix="Of a dict pass list(values.values()); put a single one into a list.",
        ) from error


def variables_in(what: str, values: Any) -> list[Any]:
    """Return the variables in what stands for a list of them.

    Args:
        what: What it is, for the message.
        values: A list of variables.

    Raises:
        ArgumentTypeError: If it is no list, or something in it no variable.
    """
    variables = listed(what, values)
    for variable in variables:
        if not backend.current().is_variable(variable):
            raise ArgumentTypeError(
                f"Something in `{what}` is no variable.",
                received=f"{_shown(variable)} of type {type(variable).__name__}",
                expected="keras.Variable objects",
                fix="model.trainable_variables is such a list.",
            )
    return variables


def pairs_in(grads_and_vars: Any) -> tuple[list[Any], list[Any]]:
    """Return the gradients and the variables of what `apply_gradients` was given.

    Args:
        grads_and_vars: Pairs.

    Raises:
        ArgumentTypeError: If it is no list, or something in it no pair.
    """
    pairs = [
        pair if isinstance(pair, tuple | list) else (pair,)
        for pair in listed("grads_and_vars", grads_and_vars)
    ]
    for pair in pairs:
        if len(pair) != 2:  # noqa: PLR2004 - a pair
            raise ArgumentTypeError(
                "Something in `grads_and_vars` is no pair.",
                received=f"{_shown(pair)} of {len(pair)}",
                expected="(gradient, variable) pairs",
                fix="zip(grads, model.trainable_variables) gives such.",
            )
    return [gradient for gradient, _ in pairs], [variable for _, variable in pairs]


def gradients(grads: Sequence[Any], variables: Sequence[Any] | None = None) -> list[Any]:
    """Return gradients as tensors, those of variables in their shapes.

    What Keras takes for a gradient is taken: lists, numbers, arrays, and what broadcasts.

    Args:
        grads: One gradient, or None, for each variable.
        variables: The variables; None where they are not known.

    Raises:
        LossScaleError: If one cannot be the gradient of its variable.
    """
    framework = backend.current()
    if variables is not None and framework.are_gradients(grads, variables):
        return list(grads)
    known = [None] * len(grads) if variables is None else variables
    shapes = known if variables is None else framework.shapes_of(variables)
    return [
        g if g is None or framework.is_gradient(g, shape) else _gradient(g, v, shape)
        for g, v, shape in zip(grads, known, shapes, strict=True)
    ]


def _gradient(given: Any, variable: Any, shape: Any) -> Any:
    framework = backend.current()
    values = framework.dense_values(given)
    tensor = real_tensor(
        "A gradient", values, "" if variable is None else f" for {names([variable])}"
    )
    if values is not given:
        return given  # sparse: its rows find their places by themselves
    if not keras.backend.is_float_dtype(name_of(tensor.dtype)):
        tensor = ops.cast(tensor, "float32")
    if shape is None:
        return tensor
    wanted: Any = tuple(shape)
    found: Any = framework.static_shape(tensor)
    if found is None or (
        len(found) == len(wanted)
        and all(a in {None, b} for a, b in zip(found, wanted, strict=True))
    ):
        return tensor
    try:
        broadcasts = np.broadcast_shapes(found, wanted) == wanted
    except (TypeError, ValueError):
        broadcasts = False
    if not broadcasts:
        raise LossScaleError(
            "A gradient does not have the shape of its variable.",
            received=f"{found} for {names([variable])} of shape {wanted}",
            expected=f"a gradient of shape {wanted}",
            fix="Pass gradients and variables in the same order.",
        )
    return ops.broadcast_to(tensor, wanted)


def real_tensor(what: str, value: Any, of: str = "") -> Any:
    """Return a tensor of real numbers, of whatever Keras makes one of.

    Args:
        what: What it is, for the message.
        value: The value.
        of: What it belongs to, for the message.

    Raises:
        LossScaleError: If it is no tensor of numbers, or one of complex numbers.
    """
    try:
        tensor = ops.convert_to_tensor(value)
        dtype = "symbol" if isinstance(tensor, keras.KerasTensor) else name_of(tensor.dtype)
    except Exception as error:  # each framework has errors of its own for it
        raise _no_numbers(what, f"{_shown(value)} of type {type(value).__name__}{of}") from error
    if dtype.startswith("complex"):
        raise LossScaleError(
            f"{what} is complex, and a step would lose its imaginary part.",
            received=f"{dtype}{of}",
            expected="real numbers",
            fix="Make the loss real, by keras.ops.real or keras.ops.absolute.",
        )
    if not dtype.startswith(("float", "bfloat", "int", "uint", "bool")):
        raise _no_numbers(what, f"{dtype}{of}")
    return tensor


def _no_numbers(what: str, received: str) -> LossScaleError:
    return LossScaleError(
        f"{what} is no tensor of numbers.",
        received=received,
        expected="a tensor, an array, a number or a list of numbers",
        fix="Pass what the framework gives as gradient or loss.",
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def refuse_rate(value: Any) -> None:
    """Raise for a learning rate that is no number; schedules, functions and tensors may come.

    Args:
        value: The learning rate.

    Raises:
        LossScaleError: If it is inf, NaN, text, None or a bool.
    """
    if isinstance(value, str | bytes | bool | np.bool_ | Mapping) or value is None:
        shown = f"{value!r} of type {type(value).__name__}"
    elif isinstance(value, numbers.Real) and not np.isfinite(float(value)):
        shown = repr(value)
    else:
        return
    raise LossScaleError(
        "The learning rate cannot be used.",
        received=shown,
        expected="a finite number, or a keras.optimizers.schedules.LearningRateSchedule",
        fix="The usual first try for Adam is 1e-3.",
    )


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
    if not optimizer.built and given is not None:
        variables_in("trainable_variables", given)
    elif given is None and not optimizer.built:
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
    if optimizer.built and not are_all_of(optimizer, variables):
        try:
            optimizer._check_variables_are_known(variables)  # noqa: SLF001 - see keras_internals
        except (AttributeError, ValueError) as error:  # TensorFlow asks for what a variable has
            raise LossScaleError(
                "Unknown variable: the optimizer was built with others.",
                received=names(variables),
                expected=f"variables among {names(optimizer.target_variables)}",
                fix="Use one optimizer for each model, and build it with all variables that it "
                "shall ever update.",
            ) from error
    return variables


def stateless(
    optimizer: Any, state: Any, grads: Any, weights: Any
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return as lists what a pure step is made of; see `LossScaleOptimizer.stateless_apply`.

    Args:
        optimizer: A `LossScaleOptimizer`.
        state: Values of its variables.
        grads: Gradients.
        weights: Values of the variables that it was built with.

    Returns:
        The state, the gradients as tensors, and the weights.

    Raises:
        LossScaleError: If it is not built, numbers of values differ, or a gradient cannot be one.
        ArgumentTypeError: If one of them is no list.
    """
    if not optimizer.built:
        raise LossScaleError(
            "stateless_apply needs the optimizer's variables.",
            received="an optimizer that is not built",
            expected="a built one",
            fix="Call optimizer.build(model.trainable_variables) first.",
        )
    # Some of what stands for a list can be read but once.
    state = listed("optimizer_variables", state)
    weights = listed("trainable_variables", weights)
    grads = listed("grads", grads)
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
    return state, gradients(grads, optimizer.target_variables), weights


def refuse_setting(optimizer: Any, name: str, value: Any) -> None:
    """Raise if an attribute of the wrapper is set that no step would look at there.

    Args:
        optimizer: A `LossScaleOptimizer`.
        name: The attribute.
        value: What it is set to.

    Raises:
        LossScaleError: For a schedule or an inner optimizer after `build`, for a switch that is no
            bool, and for what belongs to the inner optimizer.
        ArgumentTypeError: For a schedule or an inner optimizer that is none.
    """
    if name in _PARTS and getattr(optimizer, "built", False):
        raise LossScaleError(
            f"The state and the steps compiled so far belong to the {_PARTS[name]} that there is.",
            received=f"optimizer.{name} = {value!r} after build",
            expected=f"another {_PARTS[name]} before build",
            fix="Set optimizer.loss_scale, or make a new optimizer with loss_scale=<schedule>."
            if name == "schedule"
            else "Make a new LossScaleOptimizer around it.",
        )
    if name == "schedule":
        usable(value)
    if name == "inner_optimizer" and name in vars(optimizer):
        if isinstance(value, str):  # only the constructor makes an optimizer of it
            raise ArgumentTypeError(
                "`inner_optimizer` is no optimizer.",
                received=f"{value!r} of type {type(value).__name__}",
                expected="an optimizer",
                fix=f"keras.optimizers.get({value!r}) makes one of a name.",
            )
        inner(value)
    if name in _SWITCHES:
        validation.switch(name, value)
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
        LossScaleError: For an unknown name, an optimizer that scales already, or a learning rate
            that is inf or NaN.
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
    for rate in learning_rate_numbers(optimizer):
        refuse_rate(rate)
    return optimizer


def usable(schedule: Any) -> None:
    """Raise unless a schedule, a user's own perhaps, can scale a loss.

    One of the user's own is tried at its first state: a step that finds out would be too late.

    Args:
        schedule: The schedule.

    Raises:
        ArgumentTypeError: If it is none.
        LossScaleError: If it lacks a setting, or its `init` or `update` return no state.
    """
    if not isinstance(schedule, LossScale):
        raise ArgumentTypeError(
            "`schedule` is no schedule.",
            received=f"{schedule!r} of type {type(schedule).__name__}",
            expected="a LossScale",
            fix="For a fixed scale take FixedLossScale(number).",
        )
    if type(schedule).__module__.partition(".")[0] == "kerasmp":
        return
    unknown = [name for name in schedule.measures if name not in STATISTICS]
    if unknown:
        raise _no_rule(
            schedule, f"measures = {schedule.measures!r}", f"names among {[*STATISTICS]}"
        )
    for name in ("initial_scale", "min_scale", "max_scale"):
        if not hasattr(schedule, name):
            raise _no_rule(schedule, f"no attribute `{name}`", f"a number `{name}`")
        validation.scale(name, getattr(schedule, name))
    validation.enclosed(schedule)
    first = schedule.init()
    if not isinstance(first, Mapping) or not {"scale", "step_counter"} <= {*first}:
        raise _no_rule(schedule, f"{first!r} from init", 'a dict with "scale" and "step_counter"')
    for key, value in first.items():
        kind = {"step_counter": numbers.Integral}.get(key, numbers.Real)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise _no_rule(schedule, f"{key!r}: {value!r} from init", "Python numbers")
    validation.scale("scale", first["scale"])
    for finite in (True, False):
        measured = dict.fromkeys(schedule.measures, 0.5 if finite else 0.0)
        _check_state(schedule, first, schedule.update(dict(first), finite, **measured), finite)


def _check_state(schedule: LossScale, first: Any, after: Any, finite: bool) -> None:  # noqa: FBT001 - one caller
    call = f"update(init(), finite={finite})"
    if not isinstance(after, Mapping):
        raise _no_rule(schedule, f"{after!r} from {call}", "a dict")
    missing = [key for key in first if key not in after]
    if missing:
        raise _no_rule(schedule, f"no {missing} from {call}", f"the keys {[*first]}")
    scale = real_tensor("The scale", after["scale"], f" from {call}")
    try:
        value = ops.convert_to_numpy(scale)
    except Exception:  # noqa: BLE001 - of a trace, in which no number is known
        return
    if value.shape != () or not 0.0 < float(value) < math.inf:
        raise _no_rule(schedule, f"the scale {after['scale']!r} from {call}", "a number above 0")


def _no_rule(schedule: LossScale, received: str, expected: str) -> LossScaleError:
    return LossScaleError(
        f"{type(schedule).__name__} is no schedule that could scale a loss.",
        received=received,
        expected=expected,
        fix="See kerasmp.LossScale for what a schedule is made of.",
    )


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
