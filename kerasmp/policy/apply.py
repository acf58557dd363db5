"""Makes layers follow the policies that were assigned to them, in location, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import keras

from kerasmp.backend.keras_graph import refresh_symbolic_dtypes, renew_mask_casts, set_policy
from kerasmp.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kerasmp.policy.assign import Assignment


# What takes changes back: functions without arguments, to be called from the last to the first.
# Each comes on the list before its change, or with it.
Undo: TypeAlias = list[Callable[[], object]]


def take_back(undo: Undo) -> None:
    """Take changes back, the last one first, and empty the list.

    What fails does not keep the others from being taken back. An interrupt does: it leaves on the
    list what is not done yet, so that this can be called again. Do so in a `finally`.

    Args:
        undo: The list.

    Raises:
        Exception: The first one that was raised meanwhile, at the end.

    Example:

    >>> undo = [lambda: print("first"), lambda: print("last")]
    >>> take_back(undo)
    last
    first
    >>> undo
    []
    """
    failed = None
    while undo:
        try:
            undo[-1]()
        except Exception as error:  # noqa: BLE001 - a user's layer, called anew, may raise any
            failed = failed or error
        undo.pop()
    if failed is not None:
        raise failed


def apply(model: Any, assignments: Iterable[Assignment], *, variables_follow: bool = False) -> None:
    """Let layers follow the policies assigned to them. Weights stay as they are.

    Args:
        model: The model.
        assignments: What to do; rows whose policy does not change are passed over.
        variables_follow: Whether the caller changes the dtypes of variables accordingly.

    Raises:
        PolicyError: If a layer's weights would have to change their dtype; nothing has changed.
    """
    todo = [row for row in assignments if row.before != row.after]
    for row in todo:
        if not variables_follow:
            check_variable_dtype(row)
    if not todo:
        return
    undo: Undo = [functools.partial(refresh_symbolic_dtypes, model)]
    try:
        for row in todo:
            undo.append(functools.partial(set_layer_policy, row.layer, row.layer.dtype_policy))
            set_layer_policy(row.layer, row.policy_after)
        refresh_symbolic_dtypes(model)
    except BaseException:  # a layer that cannot be called in its new dtype, or an interrupt
        try:
            take_back(undo)
        finally:
            take_back(undo)
        raise


def set_layer_policy(layer: Any, policy: keras.DTypePolicy) -> None:
    """Give a layer a policy, and renew the constants that it keeps in the dtype of before.

    The symbolic tensors of graphs are left as they are.

    Args:
        layer: The layer; those inside are left alone.
        policy: Its policy.
    """
    set_policy(layer, policy)
    if isinstance(layer, keras.layers.Normalization):
        recast_statistics(layer)
    elif isinstance(layer, keras.layers.Masking):
        renew_mask_casts(layer)


def check_variable_dtype(row: Assignment) -> None:
    """Raise if a layer's weights would have to change their dtype.

    Args:
        row: What the layer is assigned.

    Raises:
        PolicyError: If they would.
    """
    have, want = row.policy.variable_dtype, row.policy_after.variable_dtype
    if have != want and row.layer.weights:
        raise PolicyError(
            "The layer is built, and its weights stay in the dtype they have.",
            received=f'"{row.path}" with weights in {have}, and a policy that wants {want}',
            expected=f"a policy with {have} variables",
            fix='For half precision over float32 variables use a "mixed_" policy. convert(...) '
            'changes variables where it is asked to, as by variables="float16".',
        )


def recast_statistics(layer: Any) -> None:
    """Cast the mean and variance of a Normalization anew: it does so when built or adapted only.

    Args:
        layer: The layer.
    """
    if layer.input_mean is None:
        layer.finalize_state()
    elif layer.built:
        layer.build(**layer.get_build_config())
