"""The policy that suits this device, with the reason."""

from __future__ import annotations

import dataclasses

from kerasmp.policy import hardware
from kerasmp.policy.policy import Policy


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """A policy for a device, with the reason.

    Args:
        policy: The policy to use.
        reason: Why, in one sentence.
        device: The name of the device.
    """

    policy: Policy
    reason: str
    device: str


def recommend_policy() -> Recommendation:
    """Return the policy that suits the device on which Keras will run, as `Policy("auto")` does.

    The device is looked up at each call, without starting a GPU if that can be avoided.

    Returns:
        The policy, the reason in one sentence, and the device.

    Example:
    >>> recommend_policy().policy.variable_dtype
    'float32'
    """
    name, reason, device = hardware.recommend()
    return Recommendation(Policy(name), reason, device)
