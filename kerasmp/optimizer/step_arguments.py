"""Checks and conversions of the arguments of a step: gradients, variables and losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from kerasmp import backend
from kerasmp.backend.optimizer_internals import is_built_with
from kerasmp.backend.tensors import dtype_name
from kerasmp.errors import ArgumentTypeError, LossScaleError, with_type

if TYPE_CHECKING:
    from collections.abc import Sequence


def not_built(method: str) -> LossScaleError:
    """Return the error of a method that needs a built optimizer."""
    return LossScaleError(
        f"{method} needs a built optimizer.",
        received="an optimizer that is not built",
        expected="a built one",
        fix="Call optimizer.build(model.trainable_variables) first.",
    )


def as_list(name: str, values: Any) -> list[Any]:
    """Return the values of an iterable argument as a list.

    Raises:
        ArgumentTypeError: If it is not an iterable, or one that is not meant as a list. A dict
            would give its keys, for example.
    """
    try:
        if isinstance(values, str | bytes | Mapping | keras.Variable):
            raise TypeError  # noqa: TRY301 - handled like every other value that is not a list
        return list(values)
    except TypeError as error:
        raise ArgumentTypeError(
            f"`{name}` is not a list.",
            received=with_type(values),
            expected="a list",
            fix="For a dict pass list(values.values()). Put a single value into a list.",
        ) from error


def as_variables(name: str, values: Any) -> list[Any]:
    """Return an argument as a list of variables.

    Raises:
        ArgumentTypeError: If it is not a list, or an item is not a variable.
    """
    variables = as_list(name, values)
    for variable in variables:
        if not backend.current().is_variable(variable):
            raise ArgumentTypeError(
                f"An item of `{name}` is not a variable.",
                received=with_type(variable),
                expected="keras.Variable objects",
                fix="Pass model.trainable_variables, for example.",
            )
    return variables


def unzip_pairs(grads_and_vars: Any) -> tuple[list[Any], list[Any]]:
    """Return the gradients and the variables of the argument of `apply_gradients`.

    Raises:
        ArgumentTypeError: If it is not a list, or an item is not a pair.
    """
    pairs = [
        pair if isinstance(pair, tuple | list) else (pair,)
        for pair in as_list("grads_and_vars", grads_and_vars)
    ]
    for pair in pairs:
        if len(pair) != 2:  # noqa: PLR2004 - a pair
            raise ArgumentTypeError(
                "An item of `grads_and_vars` is not a pair.",
                received=f"{with_type(pair)} and length {len(pair)}",
                expected="(gradient, variable) pairs",
                fix="Pass zip(grads, model.trainable_variables), for example.",
            )
    return [gradient for gradient, _ in pairs], [variable for _, variable in pairs]


def variables_for(optimizer: Any, grads: Sequence[Any], given: list[Any] | None) -> list[Any]:
    """Return the variables that the gradients of `apply` belong to.

    Args:
        optimizer: A `LossScaleOptimizer`.
        grads: The gradients.
        given: The variables that `apply` was called with, if any.

    Raises:
        LossScaleError: If their numbers differ, all gradients are None, or the optimizer does not
            know the variables.
        ArgumentTypeError: If an item is not a variable.
    """
    if not optimizer.built and given is not None:
        as_variables("trainable_variables", given)
    elif given is None and not optimizer.built:
        raise LossScaleError(
            "The optimizer does not know which variables the gradients belong to.",
            received="only gradients, and an optimizer that is not built",
            expected="apply(grads, trainable_variables)",
            fix="Pass the variables, or call build(trainable_variables) first.",
        )
    variables = optimizer.target_variables if given is None else given
    if len(variables) != len(grads):
        raise LossScaleError(
            "The numbers of gradients and variables differ.",
            received=f"{len(grads)} gradients for {len(variables)} variables",
            expected="one gradient, or None, for each variable",
            fix="Pass both lists in the same order.",
        )
    _refuse_all_none(grads)
    if optimizer.built and not is_built_with(optimizer, variables):
        try:
            optimizer._check_variables_are_known(variables)  # noqa: SLF001 - see optimizer_internals
        except (AttributeError, ValueError) as error:  # an item may lack an attribute of variables
            raise LossScaleError(
                "Unknown variable: the optimizer was built with other variables.",
                received=_names(variables),
                expected=f"variables among {_names(optimizer.target_variables)}",
                fix="Use one optimizer for each model, and build it with all variables that it "
                "should ever update.",
            ) from error
    return variables


def pure_step_arguments(
    optimizer: Any, state: Any, grads: Any, weights: Any
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the arguments of `stateless_apply` as lists, and the gradients as tensors.

    Raises:
        LossScaleError: If the optimizer is not built, the number of values is wrong, all gradients
            are None, or one does not fit its variable.
        ArgumentTypeError: If an argument is not a list.
    """
    if not optimizer.built:
        raise not_built("stateless_apply")
    # Each is converted only once, since it may be an iterator.
    state = as_list("optimizer_variables", state)
    weights = as_list("trainable_variables", weights)
    grads = as_list("grads", grads)
    number = len(optimizer.target_variables)
    for name, values, expected in (
        ("optimizer_variables", state, len(optimizer.variables)),
        ("trainable_variables", weights, number),
        ("grads", grads, number),
    ):
        if len(values) != expected:
            raise LossScaleError(
                f"`{name}` does not match the variables of the built optimizer.",
                received=f"{len(values)} values",
                expected=f"{expected}",
                fix="Pass one value for each variable, in the order of `build`.",
            )
    _refuse_all_none(grads)
    return state, as_gradients(grads, optimizer.target_variables), weights


def _refuse_all_none(grads: Sequence[Any]) -> None:
    if grads and all(g is None for g in grads):
        raise LossScaleError(
            "No gradients provided for any variable.",
            received=f"{len(grads)} gradients, all None",
            expected="a gradient for at least one variable",
            fix="Check that the loss depends on the trainable variables.",
        )


def as_gradients(grads: Sequence[Any], variables: Sequence[Any] | None = None) -> list[Any]:
    """Return gradients as tensors in the shapes of their variables.

    As in Keras, lists, numbers, arrays and what can be broadcast are accepted.

    Args:
        grads: One gradient, or None, for each variable.
        variables: The variables, or None if they are not known.

    Raises:
        LossScaleError: If one cannot be the gradient of its variable.
    """
    framework = backend.current()
    if variables is not None and framework.are_gradients(grads, variables):
        return list(grads)
    known = [None] * len(grads) if variables is None else variables
    shapes = known if variables is None else framework.shapes_of(variables)
    return [
        g if g is None or framework.is_gradient(g, shape) else _as_gradient(g, v, shape)
        for g, v, shape in zip(grads, known, shapes, strict=True)
    ]


def _as_gradient(given: Any, variable: Any, shape: Any) -> Any:
    framework = backend.current()
    values = framework.dense_values(given)
    of_variable = "" if variable is None else f" for {_names([variable])}"
    tensor = as_real_tensor("A gradient", values, of_variable)
    if values is not given:
        return given  # a sparse gradient has indices instead of the shape
    if not keras.backend.is_float_dtype(dtype_name(tensor.dtype)):
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
            received=f"{found}{of_variable} of shape {wanted}",
            expected=f"a gradient of shape {wanted}",
            fix="Pass gradients and variables in the same order.",
        )
    return ops.broadcast_to(tensor, wanted)


def as_real_tensor(what: str, value: Any, where: str = "") -> Any:
    """Return a value that Keras can convert to a tensor of real numbers as that tensor.

    Args:
        what: What the value is, for the message.
        value: The value.
        where: What it belongs to or comes from, for the message.

    Raises:
        LossScaleError: If it cannot be converted, or its numbers are complex.
    """
    try:
        tensor = ops.convert_to_tensor(value)
        dtype = "symbol" if isinstance(tensor, keras.KerasTensor) else dtype_name(tensor.dtype)
    except Exception as error:  # the type of the error depends on the framework
        raise _not_numeric(what, f"{with_type(value)}{where}") from error
    if dtype.startswith("complex"):
        raise LossScaleError(
            f"{what} is complex, and a step would lose its imaginary part.",
            received=f"{dtype}{where}",
            expected="real numbers",
            fix="Make the loss real with keras.ops.real or keras.ops.absolute.",
        )
    if not dtype.startswith(("float", "bfloat", "int", "uint", "bool")):
        raise _not_numeric(what, f"{dtype}{where}")
    return tensor


def _not_numeric(what: str, received: str) -> LossScaleError:
    return LossScaleError(
        f"{what} is not a numeric tensor.",
        received=received,
        expected="a tensor, an array, a number or a list of numbers",
        fix="Pass the loss or the gradients that the framework computed.",
    )


def _names(variables: Sequence[Any]) -> str:
    """Return the names of variables for a message. TensorFlow's own variables have no path."""
    return ", ".join(str(getattr(v, "path", None) or getattr(v, "name", v)) for v in variables)
