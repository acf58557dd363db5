"""Tracing on torch, which finds operations that have no half-precision kernel."""

from __future__ import annotations

import re
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import keras
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from kerasmp.backend.keras_internals import compute_output_spec
from kerasmp.backend.protocol import Backend
from kerasmp.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

# The messages of kernels that do not support a dtype.
_NO_KERNEL = re.compile(
    r"not implemented for '(Complex)?(Half|BFloat16)'|Low precision dtypes not supported"
    r"|(Unsupported dtype|support tensors of type:?|types other than float and double).*"
    r"|expected scalar type (Float|Double) but found (Half|BFloat16)"
    r"|Expected both inputs to be Half, Float or Double tensors"
)
_HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.complex32: "float16"}


class Tracing(Backend):
    """The methods of `Backend` that trace calls, or run them eagerly."""

    def trace(self, call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:
        """Trace a call, and raise if it fails or this device has no kernel for it.

        Keras calls it with tensors without data, for which torch looks up no kernel, and with data
        if that raises.
        """
        # Here it is the device of the user's scope and process. It also starts a GPU's generators.
        device = keras.ops.ones(()).device
        # A probe runs its operation, and Keras may run the call: both may draw random numbers.
        states = {generator: generator.get_state() for generator in default_generators()}
        probes = _KernelProbes(device, states, backwards=backwards)

        def called(*args: Any, **kwargs: Any) -> Any:
            if probes.error is not None:
                raise probes.error
            with probes:
                return call(*args, **kwargs)

        try:
            compute_output_spec(called, *args, **kwargs)
        finally:
            for generator, state in states.items():
                generator.set_state(state)

    def eager_scope(self) -> Any:
        """Return a scope that records no gradients; torch runs eagerly anyway."""
        return torch.no_grad()

    def probe_scope(self) -> Any:
        """Return a scope that records no gradients."""
        return torch.no_grad()


def default_generators() -> list[Any]:
    """Return the default generators of the devices in use; others would be initialized by this."""
    used = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *used]


class _KernelProbes(TorchDispatchMode):
    """Raises at an operation on half-precision tensors that has no kernel for them.

    Args:
        device: The device to probe.
        states: The states of random generators. The mode adds those that the call uses.
        backwards: Whether to probe the gradients as well.
    """

    def __init__(self, device: Any, states: dict[Any, Any], *, backwards: bool) -> None:
        super().__init__()
        self.error: BackendError | None = None
        self._device = device
        self._states = states
        self._backwards = backwards

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Probe for a kernel, then run the operation."""
        given = (args, kwargs or {})
        flat = tree_flatten(given)[0]
        for generator in flat:
            if isinstance(generator, torch.Generator) and generator not in self._states:
                self._states[generator] = generator.get_state()
        dtypes = [x.dtype for x in flat if isinstance(x, torch.Tensor)]
        half = next((_HALVES[dtype] for dtype in dtypes if dtype in _HALVES), None)
        if half and not _has_kernel(func, given, dtypes, self._device, backwards=self._backwards):
            name = func.__name__.partition(".")[0]
            self.error = BackendError(f"torch has no {half} kernel for {name} on this device.")
            # The names are read now: Keras may turn this error into its own, and call again.
            owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_stack(None)]
            layers = [each.name for each in owners if isinstance(each, keras.Layer)]
            self.error.add_note("/".join(reversed(layers)))
            raise self.error
        return func(*args, **(kwargs or {}))


# By operation, device, and the dtypes of its inputs: what a probe found. Only a call can find it.
_KERNELS: dict[Any, bool] = {}
_FEW = 8  # the largest length of an axis in a probe, so that it takes no time


def _has_kernel(func: Any, given: Any, dtypes: list[Any], device: Any, *, backwards: bool) -> bool:
    if func.namespace != "aten":  # a user's operation may print, or wait for other processes
        return True
    key = (func, device.type, backwards, *dtypes)
    if key not in _KERNELS:
        # In a new thread, which is outside of any trace and records gradients.
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(_call_on_few, func, given, device, backwards=backwards)
            error = call.exception()
        if error is not None and not _NO_KERNEL.search(str(error)):
            # For instance a view that does not fit such small sizes, or an in-place change of an
            # input. This says nothing about kernels; the next call may.
            return not backwards or _has_kernel(func, given, dtypes, device, backwards=False)
        _KERNELS[key] = error is None
    return _KERNELS[key]


def _call_on_few(func: Any, given: Any, device: Any, *, backwards: bool) -> None:
    leaves = []

    def few(x: Any) -> Any:
        if isinstance(x, torch.device):
            return device
        if isinstance(x, int):  # may be a size
            return min(x, _FEW)
        if not isinstance(x, torch.Tensor):
            return x
        # An integer may be an index: with 1 for an axis of length 1, a GPU aborts the process.
        dtype = x.dtype
        one = dtype.is_floating_point or dtype.is_complex or dtype is torch.bool
        shape = [min(d, _FEW) for d in x.shape]
        leaves.append(torch.full(shape, int(one), dtype=dtype, device=device))
        return leaves[-1].requires_grad_(backwards and dtype.is_floating_point)

    args, kwargs = tree_map(few, given)
    outputs = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
    sums = [x.abs().sum() for x in outputs if x.requires_grad]
    if sums:
        torch.autograd.grad(sums, [x for x in leaves if x.requires_grad], allow_unused=True)
