"""What one layer is assigned, and the way back from changes, for tests of single steps."""

from kerasmp.policy import apply
from kerasmp.policy.assign import Assignment


def assigned(layer, policy):
    """Return the row that lets a layer follow a policy."""
    return Assignment(layer, layer.name, layer.dtype_policy, policy, "the test")


def take_back(undo):
    """Take back the changes on a list."""
    apply.take_back(undo)
