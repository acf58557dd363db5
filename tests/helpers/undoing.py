"""Assign a policy to one layer, and undo changes, for tests of single steps."""

from kerasmp.policy import apply
from kerasmp.policy.assign import Assignment


def assigned(layer, policy):
    """Return the assignment of a policy to a layer."""
    return Assignment(layer, layer.name, layer.dtype_policy, policy, "the test")


def take_back(undo):
    """Undo the changes on a list."""
    apply.take_back(undo)
