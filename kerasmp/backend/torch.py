"""What only torch needs: variables that change in place, and an eager train step."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from kerasmp.backend.keras_private import states_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# The loss that scale_loss sees can be read when the gradients are applied.
LOSS_MEETS_APPLY = True

# A branch of eager code waits for the device.
BRANCHES = False

# The gradient of what is broadcast or used in each step of a loop is summed in float32.
NARROW_SUMS = False


def convolution_dtype(dtype: str) -> str:
    """Return the dtype in which convolutions compute whose inputs have `dtype`."""
    return dtype


def recurrence_dtype(dtype: str) -> str:
    """Return the dtype for a whole LSTM or GRU that computes in `dtype`.

    torch's own loop for the CPU sums the gradients of kernels in float16 over the time steps.
    """
    return "float32" if dtype == "float16" and not torch.cuda.is_available() else dtype


MIXED_DTYPES = re.compile(
    r"to have the same dtype, but got|expected scalar type (Half|BFloat16|Float) but found"
    r"|Input type \(.*\) and (weight|bias) type \(.*\) should be the same"
)


def dense_values(gradient: Any) -> Any:
    """Return the numbers of a gradient."""
    return gradient


def with_values(gradient: Any, values: Any) -> Any:  # noqa: ARG001 - one signature for all backends
    """Return `gradient` with other numbers at the same places."""
    return values


def checked(values: Sequence[Any], exactly: Callable[[], Any]) -> Any:  # noqa: ARG001
    """Return which values are finite, as `exactly` does: nothing here is quicker."""
    return exactly()


def place() -> tuple[Any, Any]:
    """Return what tells this replica and this trace from others; a trace is None in eager code."""
    return None, None


def refuse_no_replica() -> None:
    """Raise where gradients have no replica: never here."""


def agreed(grads: Sequence[Any], variables: Sequence[Any], losses: Any) -> tuple[Any, Any]:  # noqa: ARG001
    """Return the gradients and the losses as all replicas see them.

    On torch there is one replica, or the gradients are reduced before they come here.
    """
    return grads, losses


def bakes_in(scale: Any) -> bool:  # noqa: ARG001 - one signature for all backends
    """Return whether a traced function that reads `scale` here keeps this value for all calls."""
    return False  # eager code reads it in each step


def run_step(
    finite: Any,
    step: Any,
    update: Callable[[Any], None],
    advance: Callable[[Any, Any, bool], None],
    inner_optimizer: Any,  # noqa: ARG001 - one signature for all backends
) -> None:
    """Update the variables if all gradients are finite, else only move the scale.

    Eager code branches on the host: one flag is read from the device each step, as PyTorch's own
    GradScaler does.
    """
    with torch.no_grad():
        applied = bool(finite.all())
        if applied:
            update(step)
        advance(step, finite, applied)


def start_as(variable: Any, other: Any) -> None:
    """Give a variable that holds nothing but zeros the value of another one."""
    with torch.no_grad():
        if not variable.value.any():
            variable.assign(other.value)


def keep_apart(variable: Any, other: Any) -> None:
    """Nothing to do: variables of torch never share their memory."""


def add_to(variable: Any, value: Any) -> None:
    """Add to a variable."""
    variable.assign_add(value)


def matmul_wide(left: Any, right: Any, dtype: str) -> Any:
    """Return the matrix product in `dtype`, without rounding it to that of the factors."""
    # No kernel of torch's that has a gradient takes float16 and gives float32.
    wide = getattr(torch, dtype)
    return torch.matmul(left.to(wide), right.to(wide))


def has_flash_attention(query: Any, key: Any, value: Any, *, is_causal: bool) -> bool:
    """Return whether Keras would use flash attention here if it were left to choose."""
    # Only Keras knows, and has no public name for it.
    from keras.src.backend.torch.nn import _can_use_flash_attention

    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    return bool(_can_use_flash_attention(*heads_first, None, is_causal))


def sync(model: Any) -> None:
    """Make the variables current: torch's always are."""


def in_dtype(parameter: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
    """Change the dtype of a parameter, as `torch.nn.Module.to` does.

    It stays the object that the dicts of layers and of all that hold them have, and optimizers of
    torch's own. Its gradient, which would not fit, is dropped.

    Returns:
        The parameter, and what puts back its numbers and its gradient.
    """
    before, gradient = parameter.data, parameter.grad
    data = before.to(getattr(torch, dtype))
    parameter.grad = None
    parameter.data = data

    def put_back() -> None:
        parameter.grad = None
        parameter.data = before
        parameter.grad = gradient

    return parameter, put_back


def mixes_dtypes(error: Exception) -> bool:
    """Return whether an error says that operands of different float dtypes met."""
    return isinstance(error, RuntimeError) and MIXED_DTYPES.search(str(error)) is not None


def train_step(
    model: Any,
    optimizers: Sequence[Any],
    step: Callable[..., Any],
    logs_after: Callable[[Any, Any], Any],
    data: Any,
) -> Any:
    """Run a train step and undo its traces if an optimizer skipped; see TensorFlow's."""
    guarded = [*states_of(model), *model.metrics_variables]
    before = [v.value.detach().clone() for v in guarded]
    # Dropout without a seed draws from torch's own generators, not from a Keras variable.
    generators = _generators()
    states = [generator.get_state() for generator in generators]
    # A copy: what is read is a view of the variable. Before the first step there may be none.
    skips = [o.skips().clone() if o.built else 0 for o in optimizers]
    logs = step(data)
    pairs = zip(optimizers, skips, strict=True)
    skipped = any(bool(o.skips() > number) for o, number in pairs if o.built)
    if not skipped:
        return logs
    with torch.no_grad():
        for variable, value in zip(guarded, before, strict=True):
            variable.assign(value)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return logs_after(logs, skipped)


def _generators() -> list[Any]:
    # The default generators of devices that are in use; asking for others would initialise them.
    used = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *used]


# The products that a user's layer may call itself; `kerasmp.backend.products` counts them.
PRODUCTS = tuple((torch, name) for name in ("matmul", "inner", "vdot", "einsum", "tensordot"))


def eagerly() -> Any:
    """Let no gradients be recorded; all else is eager."""
    return torch.no_grad()


# Nothing more has to be replaced for that.
COMPILED: tuple[Any, ...] = ()
