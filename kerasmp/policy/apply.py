"""Give layers the policies that were assigned to them, and take the changes back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import keras

from kerasmp.backend.keras_graph import refresh_symbolic_dtypes, set_policy, update_mask_casts
from kerasmp.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kerasmp.policy.assign import Assignment

# Functions that take changes back, to be called from the last to the first. Each is added before
# its change, or with it.
Undo: TypeAlias = list[Callable[[], object]]


def take_back(undo: Undo) -> None:
    """Take changes back, the last one first, and empty the list.

    A function that fails does not stop the others, nor does an interrupt: the function that it has
    stopped runs again. Another interrupt leaves the rest on the list.

    Args:
        undo: The list.

    Raises:
        Exception: The first exception of a function, after all of them have run.

    Example:

    >>> undo = [lambda: print("first"), lambda: print("last")]
    >>> take_back(undo)
    last
    first
    >>> undo
    []
    """
    try:
        _run(undo)
    finally:
        _run(undo)  # the rest, after an interrupt


def _run(undo: Undo) -> None:
    failed = None
    while undo:
        try:
            undo[-1]()
        except Exception as error:  # noqa: BLE001 - a user-defined layer may raise any
            failed = failed or error
        undo.pop()
    if failed is not None:
        raise failed


def apply(model: Any, assignments: Iterable[Assignment], *, variables_follow: bool = False) -> None:
    """Give layers the policies assigned to them. Weights stay as they are.

    Args:
        model: The model.
        assignments: What `assign` returned. Rows whose policy does not change are ignored.
        variables_follow: Whether the caller changes the dtypes of the variables to match.

    Raises:
        PolicyError: If a layer's weights would need another dtype. Nothing has changed then.
    """
    todo = [row for row in assignments if row.before != row.after]
    for row in todo:
        if not variables_follow:
            check_variable_dtype(row)
    if not todo:
        return
    undo: Undo = [functools.partial(refresh_symbolic_dtypes, model)]
    try:
        set_policies(((row.layer, row.policy_after) for row in todo), undo)
        refresh_symbolic_dtypes(model)
    except BaseException:  # a layer that cannot be called in its new dtype, or an interrupt
        take_back(undo)
        raise


def set_policies(policies: Iterable[tuple[Any, keras.DTypePolicy]], undo: Undo) -> None:
    """Give layers policies as `set_layer_policy` does.

    Args:
        policies: Each layer with its policy.
        undo: Gets, before each change, the function that takes it back.
    """
    for layer, policy in policies:
        undo.append(functools.partial(set_layer_policy, layer, layer.dtype_policy))
        set_layer_policy(layer, policy)


def set_layer_policy(layer: Any, policy: keras.DTypePolicy) -> None:
    """Give a layer a policy, and cast the constants that it keeps to the new dtype.

    The layers inside it and the symbolic tensors of graphs stay as they are.

    Args:
        layer: The layer.
        policy: Its policy.
    """
    set_policy(layer, policy)
    if isinstance(layer, keras.layers.Normalization):
        recast_statistics(layer)
    elif isinstance(layer, keras.layers.Masking):
        update_mask_casts(layer)


def check_variable_dtype(row: Assignment) -> None:
    """Raise an error if a layer's weights would need another dtype.

    Args:
        row: What the layer is assigned.

    Raises:
        PolicyError: In that case.
    """
    have, want = row.policy.variable_dtype, row.policy_after.variable_dtype
    if have != want and row.layer.weights:
        raise PolicyError(
            "The layer is built, and its weights cannot change their dtype.",
            received=f'"{row.path}" with {have} weights, and a policy with {want} variables',
            expected=f"a policy with {have} variables",
            fix='For half precision with float32 variables, use a "mixed_" policy. To change '
            'variables, call convert(...) with an argument such as variables="float16".',
        )


def recast_statistics(layer: Any) -> None:
    """Cast the mean and variance of a Normalization, which does so only when built or adapted.

    Args:
        layer: The layer.
    """
    if layer.input_mean is None:
        layer.finalize_state()
    elif layer.built:
        layer.build(**layer.get_build_config())
