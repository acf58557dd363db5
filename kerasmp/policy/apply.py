"""Makes layers follow the policies that were assigned to them, in place, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_graph import refresh_symbolic_dtypes, renew_mask_casts, set_policy
from kerasmp.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kerasmp.policy.assign import Assignment


def apply(
    model: Any, assignments: Iterable[Assignment], *, variables_follow: bool = False
) -> list[tuple[Any, keras.DTypePolicy]]:
    """Let layers follow the policies assigned to them. Weights stay as they are.

    Args:
        model: The model.
        assignments: What to do; rows whose policy does not change are passed over.
        variables_follow: Whether the caller changes the dtypes of variables accordingly.

    Returns:
        The layers that were changed, with the policy of each before, for `put_back`.

    Raises:
        PolicyError: If a layer's weights would have to change their dtype; nothing has changed.
    """
    todo = [row for row in assignments if row.before != row.after]
    for row in todo:
        if not variables_follow:
            refuse_other_variables(row)
    changed = [(row.layer, row.layer.dtype_policy) for row in todo]
    try:
        for row in todo:
            let_follow(row.layer, row.policy_after)
        if todo:
            refresh_symbolic_dtypes(model)
    except BaseException:  # a layer that cannot be called in its new dtype, or an interrupt
        put_back(model, changed)
        raise
    return changed


def put_back(model: Any, changed: Iterable[tuple[Any, keras.DTypePolicy]]) -> None:
    """Give layers the policies that they had.

    Args:
        model: The model.
        changed: What `apply` returned.
    """
    pairs = list(changed)
    for layer, policy in pairs:
        let_follow(layer, policy)
    if pairs:
        refresh_symbolic_dtypes(model)


def let_follow(layer: Any, policy: keras.DTypePolicy) -> None:
    """Give a layer a policy, and renew the constants that it keeps in the dtype of before.

    The symbolic tensors of graphs are left as they are.

    Args:
        layer: The layer; those inside are left alone.
        policy: Its policy.
    """
    set_policy(layer, policy)
    if isinstance(layer, keras.layers.Normalization):
        renew_statistics(layer)
    elif isinstance(layer, keras.layers.Masking):
        renew_mask_casts(layer)


def refuse_other_variables(row: Assignment) -> None:
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


def renew_statistics(layer: Any) -> None:
    """Cast the mean and variance of a Normalization anew: it does so when built or adapted only.

    Args:
        layer: The layer.
    """
    if layer.input_mean is None:
        layer.finalize_state()
    elif layer.built:
        layer.build(**layer.get_build_config())
