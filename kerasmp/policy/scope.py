"""The global policy: set it, read it back, and put it back after a block.

Nothing is remembered here. The Keras policy that is set carries the policy that it was made from,
so there is no second state that could disagree with Keras's.
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
    """Make a policy the default of every layer made from now on, stock layers included.

    This sets Keras's own global policy. Like that one it belongs to the current thread, and
    `keras.backend.clear_session()` resets it.

    Args:
        policy: A policy, or anything that `Policy` accepts.

    Raises:
        PolicyError: If it does not exist or Keras cannot express it; nothing has changed then.
        ArgumentTypeError: If it is of the wrong type; nothing has changed then.

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
    """Return the global policy, whoever set it.

    Returns:
        The policy given to `set_global_policy` or `policy_scope`, with all that Keras cannot
        express; or, if Keras's global policy has been set or changed since by other means, that.

    Raises:
        PolicyError: If Keras's global policy was set by other means to one that no `Policy` can
            be, such as "int32".

    Example:
    >>> with policy_scope("mixed_bfloat16"):
    ...     global_policy()
    Policy('mixed_bfloat16')
    """
    current = keras.config.dtype_policy()
    origin = getattr(current, _ORIGIN, None)
    # A layer whose dtype_policy is set writes into the global map, if that is what it was given.
    if isinstance(origin, Policy) and _same(current, origin.to_keras()):
        return origin
    return Policy(current)


def policy_scope(policy: PolicyLike) -> AbstractContextManager[Policy]:
    """Set the global policy for the length of a `with` block.

    The policy before is back afterwards, also if the block raises. Scopes nest.

    Args:
        policy: A policy, or anything that `Policy` accepts. It is checked before the block.

    Returns:
        A context manager that gives the block the policy. It can be entered again, also inside of
        itself, and decorate functions.

    Raises:
        PolicyError: If it does not exist or Keras cannot express it.
        ArgumentTypeError: If it is of the wrong type.

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
    """What `policy_scope` returns; what was before belongs to the thread, as the policy does."""

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
                "The scope was not entered, and cannot be left.",
                received=f"__exit__ of policy_scope({self._policy!r})",
                expected="__enter__ before it",
                fix="Write `with policy_scope(policy):`.",
            )
        # The same object, not an equal one: it may carry what Keras cannot express.
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
    """Say what stock models will not follow; before anything changes, as it may be an error."""
    if policy.beyond_keras:
        warnings.warn(
            f"Stock Keras models will not follow {' and '.join(policy.beyond_keras)}: Keras has "
            "no word for it. kerasmp.Model and kerasmp.Sequential do; kerasmp.convert makes the "
            "layers of a stock model that is built follow the rules.",
            PolicyWarning,
            stacklevel=3,
        )
