"""The global policy: set it, read it, and restore it after a block.

This module has no state. The Keras policy that is set carries the `Policy` that it was created
from, so no second state can disagree with Keras's.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from typing import TYPE_CHECKING

import keras

from kerasmp.errors import PolicyError, PolicyWarning
from kerasmp.policy.policy import Policy, PolicyLike

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_ORIGIN = "_kerasmp_policy"


def set_global_policy(policy: PolicyLike) -> None:
    """Make a policy the default of all layers created from now on, stock layers included.

    This sets Keras's own global policy, which belongs to the current thread, and which
    `keras.backend.clear_session()` resets.

    Args:
        policy: A policy, or anything that `Policy` accepts.

    Raises:
        PolicyError: If the policy does not exist, or Keras cannot express it. Nothing has changed
            then.
        ArgumentTypeError: If it has the wrong type. Nothing has changed then.

    Warns:
        PolicyWarning: If stock Keras models will not follow all of it.

    Example:
    >>> before = global_policy()
    >>> set_global_policy("mixed_bfloat16")
    >>> keras.layers.Dense(1).compute_dtype
    'bfloat16'
    >>> set_global_policy(before)
    """
    checked = Policy(policy)
    _warn(checked)
    _apply(checked)


def global_policy() -> Policy:
    """Return the global policy, however it was set.

    Returns:
        The policy given to `set_global_policy` or `policy_scope`, with everything that Keras cannot
        express. If Keras's global policy was set or changed in another way since, that policy.

    Raises:
        PolicyError: If Keras's global policy was set in another way, to one that `Policy` cannot
            represent, such as "int32".

    Example:
    >>> with policy_scope("mixed_bfloat16"):
    ...     global_policy()
    Policy('mixed_bfloat16')
    """
    current = keras.config.dtype_policy()
    origin = getattr(current, _ORIGIN, None)
    # Setting the dtype_policy of a layer writes into the global map, if the layer was given it.
    if isinstance(origin, Policy) and _same(current, origin.to_keras()):
        return origin
    return Policy(current)


def policy_scope(policy: PolicyLike) -> AbstractContextManager[Policy]:
    """Set the global policy for a `with` block.

    The previous policy is restored afterwards, even if the block raises an error. Scopes nest.

    Args:
        policy: A policy, or anything that `Policy` accepts. It is checked before the block.

    Returns:
        A context manager that returns the policy. It can be entered again, also inside itself, and
        can decorate functions.

    Raises:
        PolicyError: If the policy does not exist, or Keras cannot express it.
        ArgumentTypeError: If it has the wrong type.

    Warns:
        PolicyWarning: If stock Keras models will not follow all of it.

    Example:
    >>> with policy_scope("mixed_float16") as policy:
    ...     keras.layers.Dense(1).compute_dtype
    'float16'
    """
    checked = Policy(policy)
    _warn(checked)
    return _Scope(checked)


class _Scope(contextlib.ContextDecorator, threading.local):
    """The context manager of `policy_scope`. The global policy is per thread, and so is this."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._before: list[keras.DTypePolicy] = []

    def __enter__(self) -> Policy:
        before = keras.config.dtype_policy()
        _apply(self._policy)
        self._before.append(before)
        return self._policy

    def __exit__(self, *_: object) -> None:
        if not self._before:
            raise PolicyError(
                "The policy scope cannot be left, since it was not entered.",
                received=f"__exit__ of policy_scope({self._policy!r})",
                expected="__enter__ before it",
                fix="Use `with policy_scope(policy):`.",
            )
        # This very object, since it may carry a `Policy`.
        keras.config.set_dtype_policy(self._before.pop())


def _apply(policy: Policy) -> None:
    lowered = policy.to_keras()
    setattr(lowered, _ORIGIN, policy)
    keras.config.set_dtype_policy(lowered)


def _same(left: keras.DTypePolicy, right: keras.DTypePolicy) -> bool:
    # Not `==`: Keras's raises AttributeError for two maps.
    serialize = keras.dtype_policies.serialize
    return bool(serialize(left) == serialize(right))


def _warn(policy: Policy) -> None:
    """Warn of what stock models will not follow. Comes first, as a warning may raise an error."""
    if policy.beyond_keras:
        warnings.warn(
            f"Stock Keras models will not follow {' and '.join(policy.beyond_keras)}, which Keras "
            "cannot express. kerasmp.Model and kerasmp.Sequential follow it, and kerasmp.convert "
            "makes the layers of a built stock model follow the rules.",
            PolicyWarning,
            stacklevel=3,
        )
