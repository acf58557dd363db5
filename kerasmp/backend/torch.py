"""What only torch needs: variables that change in place, and an eager train step."""

from __future__ import annotations

import functools
import re
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import keras
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from kerasmp.backend.keras_internals import compute_output_spec, non_trainable_state, values_of
from kerasmp.backend.protocol import Backend, dtype_name, finite_sums, in_parts
from kerasmp.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kerasmp.backend.protocol import Weight

MIXED_DTYPES = re.compile(
    r"to have the same dtype, but got|expected scalar type (Half|BFloat16|Float) but found"
    r"|Input type \(.*\) and (weight|bias) type \(.*\) should be the same"
)

# What kernels say of a dtype that they are not made for.
NO_KERNEL = re.compile(
    r"not implemented for '(Complex)?(Half|BFloat16)'|Low precision dtypes not supported"
    r"|(Unsupported dtype|support tensors of type:?|types other than float and double).*"
    r"|expected scalar type (Float|Double) but found (Half|BFloat16)"
    r"|Expected both inputs to be Half, Float or Double tensors"
)
_HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.complex32: "float16"}

# So many numbers stay in the cache of a CPU from one kernel of an update to the next.
_IN_CACHE = 2**18

# Such small tensors cost less to be copied into one than to be looked at one by one.
_SMALL = 2**14

# torch's kernel of SGD takes 1 less a rate, in float64: a smaller rate would lose digits.
_LEAST_RATE = 2.0**-28


class Torch(Backend):
    """See `Backend`."""

    AUTOCASTS_NESTED_LAYERS = False
    HAS_FUSED_UPDATES = True
    PRODUCTS = tuple((torch, name) for name in ("matmul", "inner", "vdot", "einsum", "tensordot"))

    def rnn_dtype(self, dtype: str) -> str:
        """Return the dtype for a whole LSTM or GRU that computes in `dtype`.

        torch's own loop for the CPU sums the gradients of kernels over the time steps in `dtype`.
        """
        narrow = dtype in {"float16", "bfloat16"} and not torch.cuda.is_available()
        return "float32" if narrow else dtype

    def matmul_to_dtype(self, left: Any, right: Any, dtype: str) -> Any:
        """Return the matrix product in `dtype`, without rounding it to that of the factors."""
        # No kernel of torch's that has a gradient takes float16 and gives float32.
        wide = getattr(torch, dtype)
        return torch.matmul(left.to(wide), right.to(wide))

    def has_flash_attention(self, query: Any, key: Any, value: Any, *, is_causal: bool) -> bool:
        """Return whether Keras would use flash attention here if it were left to choose."""
        # Only Keras knows, and has no public name for it.
        from keras.src.backend.torch.nn import _can_use_flash_attention

        heads_first = [x.transpose(1, 2) for x in (query, key, value)]
        return bool(_can_use_flash_attention(*heads_first, None, is_causal))

    def without_kernel(self, dtype: str) -> tuple[str, ...]:
        """Return the names of the stock layers that fail in a dtype, in a call or its gradient."""
        if dtype not in {"float16", "bfloat16"}:
            return ()
        return ("CutMix",) if torch.cuda.is_available() else ("AveragePooling3D", "CutMix")

    def is_mixed_dtype_error(self, error: Exception) -> bool:
        """Return whether an error says that operands of different float dtypes met."""
        return isinstance(error, RuntimeError) and MIXED_DTYPES.search(str(error)) is not None

    def eagerly(self) -> Any:
        """Let no gradients be recorded; all else is eager."""
        return torch.no_grad()

    def trace(self, call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:
        """Trace a call; raise what it raises, and where this device has no kernel for it.

        Keras calls it with tensors that have no numbers, for which torch asks no kernel, and with
        numbers if that raises.
        """
        # Here, where it is that of the user's scope and process. It starts a GPU's generators, too.
        device = keras.ops.ones(()).device
        # What asks for a kernel runs it, and Keras may run the call: both may draw numbers.
        states = {generator: generator.get_state() for generator in _generators()}
        asking = _Asking(device, states, backwards=backwards)

        def called(*args: Any, **kwargs: Any) -> Any:
            if asking.error is not None:
                raise asking.error
            with asking:
                return call(*args, **kwargs)

        try:
            compute_output_spec(called, *args, **kwargs)
        finally:
            for generator, state in states.items():
                generator.set_state(state)

    def shapes_of(self, variables: Sequence[Any]) -> list[Any]:
        """Return the shape of each variable, to be compared with that of its gradient."""
        return [v.shape for v in values_of(variables)]

    def is_gradient(self, gradient: Any, shape: Any) -> bool:
        """Return whether something is, as it is, a gradient of that shape; None is any shape."""
        is_real = type(gradient) is torch.Tensor and gradient.is_floating_point()
        return is_real and (shape is None or gradient.shape == shape)

    def are_gradients(self, grads: Sequence[Any], variables: Sequence[Any]) -> bool:
        """Return whether all are, as they are, gradients of their variables, or None."""
        return all(
            g is None or (type(g) is torch.Tensor and g.is_floating_point() and g.shape == v.shape)
            for g, v in zip(grads, values_of(variables), strict=True)
        )

    def dtypes_of(self, variables: Sequence[Any]) -> list[str]:
        """Return Keras's name of the dtype of each variable."""
        return [dtype_name(v.dtype) for v in values_of(variables)]

    def branch_if_cheap(
        self,
        state: dict[str, Any],
        allowed: Callable[[dict[str, Any]], Any],
        quick: Callable[[], Any],
        whole: Callable[[], Any],
    ) -> Any:
        """Return `quick()` where that is allowed, else `whole()`. A GPU would have to be read."""
        at_hand = all(value.is_cpu for value in state.values())
        short = at_hand and allowed({key: value.item() for key, value in state.items()})
        return quick() if short else whole()

    def fits_fused_kernels(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[bool]:
        """Return whether each gradient is a dense tensor of at most float32, its variable in order.

        The kernels walk through memory and ask for no strides: an orthogonal start has others. And
        torch.compile, which fuses by itself, cannot trace them.
        """
        if torch.compiler.is_compiling():
            return [False] * len(grads)
        strided, wide = torch.strided, torch.float64
        return [
            type(g) is torch.Tensor
            and g.layout is strided
            and g.dtype is not wide
            and v.is_contiguous()
            for g, v in zip(grads, values_of(variables), strict=True)
        ]

    def finite_per_tensor(
        self,
        values: Sequence[Any],
        dtypes: Sequence[str],
        scale: Any,
        *,
        norm: str | None,
    ) -> Any:
        """Return for each tensor whether all of it is finite once it is divided by the scale."""
        quick = values[0].is_cpu and "float16" not in dtypes and not norm and scale >= 1
        # A sum is inf or NaN if one of its terms is, in half the time; and for huge finite ones
        # too: then all numbers are looked at.
        if quick and bool(torch.isfinite(torch.stack(_sums(values))).all()):
            return torch.ones(len(values), dtype=torch.bool)
        plain = [v.detach() if v.numel() else v.new_zeros(1) for v in values]
        wide = [torch.float64 if v.dtype == torch.float64 else torch.float32 for v in plain]
        if norm and "float16" not in dtypes:
            return self.finite_norm(plain, scale, norm)  # which tells of their numbers, too
        largest = _largest(plain)
        kept = [
            (x.to(w) / scale).to(getattr(torch, dtype))
            for x, w, dtype in zip(largest, wide, dtypes, strict=True)
        ]
        found = torch.stack([torch.isfinite(x) for x in kept])
        return found & self.finite_norm(plain, scale, norm) if norm else found

    def run_step(
        self,
        step: Any,
        finite: Any,
        update: Callable[[Any, Any], None],
        advance: Callable[[Any, Any, bool], None],
        *,
        fused: bool,  # noqa: ARG002 - eager code branches before
    ) -> None:
        """Update the variables if all gradients are finite, else only move the scale.

        Eager code branches on the host: one flag is read from the device each step, as PyTorch's
        own GradScaler does.
        """
        with torch.no_grad():
            applied = bool(finite.all())
            if applied:
                update(step, None)
            advance(step, finite, applied)

    def finite_norm(self, values: Sequence[Any], scale: Any, norm: str) -> Any:
        """Return for each tensor whether the norm is finite, or else not by its fault."""
        squares = zip(_squares(values, scale), values, strict=True)
        wide = [s.to(torch.promote_types(v.dtype, torch.float32)) for s, v in squares]
        return finite_sums(wide, norm)

    @torch.no_grad()
    def sum_of_squares(self, values: Sequence[Any], divisor: Any) -> Any:
        """Return the sum of the squares of all quotients, a float32 scalar."""
        return _squares(values, divisor).sum().to(torch.float32)

    @torch.no_grad()
    def adam(  # noqa: PLR0913, PLR0917 - what Adam is made of
        self,
        weights: Sequence[Weight],
        divisor: Any,
        alpha: Any,
        betas: tuple[float, float],
        epsilon: float,
        applied: Any,  # noqa: ARG002 - eager code asks before
    ) -> None:
        """Update variables and their moments as `keras.optimizers.Adam` does."""
        # Where torch divides the moments by what corrects them it places epsilon otherwise. After
        # so many steps it corrects nothing, and the step size is Keras's.
        never = torch.full((), 1e8, device=alpha.device)
        for variables, gradients, ms, vs in _parts(weights):
            torch._fused_adam_(
                variables,
                torch._foreach_div(gradients, divisor),  # noqa: SLF001 - as Keras's own
                ms,
                vs,
                [],
                [never] * len(variables),
                lr=alpha,
                beta1=betas[0],
                beta2=betas[1],
                weight_decay=0.0,
                eps=epsilon,
                amsgrad=False,
                maximize=False,
            )

    @torch.no_grad()
    def sgd(
        self,
        weights: Sequence[Weight],
        rate: Any,
        momentum: float,
        applied: Any,  # noqa: ARG002 - eager code asks before
        *,
        nesterov: bool,
    ) -> None:
        """Update variables as `keras.optimizers.SGD` does."""
        # A CPU has the number at hand, and saves a pass. From a GPU it would have to be read.
        number = None if nesterov or not rate.is_cpu else -float(rate)
        alpha = 1 if number is None else number
        for variables, gradients, *moments in _parts(weights, scratch=number is None):
            if moments and number is not None and number <= -_LEAST_RATE:
                # m * momentum - g * rate, added to the variable: by names that mean something else.
                torch._fused_sgd_(
                    variables,
                    gradients,
                    moments[0],
                    momentum=momentum,
                    dampening=1.0 - number,
                    lr=-1.0,
                    weight_decay=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=False,
                )
                continue
            steps = gradients if number is not None else torch._foreach_mul(gradients, -rate)  # noqa: SLF001 - as Keras's own
            for ms in moments:
                torch._foreach_mul_(ms, momentum)
                torch._foreach_add_(ms, steps, alpha=alpha)
                if nesterov:
                    torch._foreach_add_(steps, ms, alpha=momentum)
            if nesterov or not moments:
                torch._foreach_add_(variables, steps, alpha=alpha)
            else:
                torch._foreach_add_(variables, moments[0])
            del steps  # before there are those of the next

    def initialize_from(self, variable: Any, other: Any) -> None:
        """Give a variable that holds nothing but zeros the value of another one."""
        with torch.no_grad():
            if not variable.value.any():
                variable.assign(other.value)

    def in_dtype(self, parameter: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
        """Change the dtype of a parameter, as `torch.nn.Module.to` does.

        It stays the object that the dicts of layers and of all that hold them have, and optimizers
        of torch's own. Its gradient, which would not fit, is dropped.

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

    def train_step(
        self,
        model: Any,
        optimizers: Sequence[Any],
        step: Callable[..., Any],
        logs_after: Callable[[Any, Any], Any],
        data: Any,
    ) -> Any:
        """Run a train step and undo its traces if an optimizer skipped; see TensorFlow's."""
        guarded = [*non_trainable_state(model), *model.metrics_variables]
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
        # A result may be the tensor of a metric's variable itself.
        logs = keras.tree.map_structure(_kept_apart, logs)
        with torch.no_grad():
            for variable, value in zip(guarded, before, strict=True):
                variable.assign(value)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return logs_after(logs, skipped)


class _Asking(TorchDispatchMode):
    """Raises where an operation is given half-precision tensors, and has no kernel for them.

    Args:
        device: The device to ask.
        states: The states of random generators. Those of more that the call uses are added.
        backwards: Whether its gradient needs one, too.
    """

    def __init__(self, device: Any, states: dict[Any, Any], *, backwards: bool) -> None:
        super().__init__()
        self.error: BackendError | None = None
        self._device = device
        self._states = states
        self._backwards = backwards

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Ask for a kernel, then call the operation."""
        given = (args, kwargs or {})
        flat = tree_flatten(given)[0]
        for generator in flat:
            if isinstance(generator, torch.Generator) and generator not in self._states:
                self._states[generator] = generator.get_state()
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        half = next((_HALVES[x.dtype] for x in tensors if x.dtype in _HALVES), None)
        ask = functools.partial(_has_kernel, func, given, tensors, self._device)
        if half and not ask(backwards=self._backwards):
            name = func.__name__.partition(".")[0]
            self.error = BackendError(f"torch has no {half} kernel for {name} here.")
            # Keras may make an error of its own of it, and call anew.
            owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_stack(None)]
            layers = [each.name for each in owners if isinstance(each, keras.Layer)]
            self.error.add_note("/".join(reversed(layers)))
            raise self.error
        return func(*args, **(kwargs or {}))


# For operations, devices and dtypes of what they take, once torch was asked. Only a call tells.
_KERNELS: dict[Any, bool] = {}
_FEW = 8  # numbers along each axis, for a call that takes no time


def _has_kernel(func: Any, given: Any, tensors: list[Any], device: Any, *, backwards: bool) -> bool:
    if func.namespace != "aten":  # a user's, say, which may print, or wait for other processes
        return True
    key = (func, device.type, backwards, *(x.dtype for x in tensors))
    if key not in _KERNELS:
        # In a thread of its own, which knows of no trace, and records gradients.
        call = functools.partial(_call_on_few, func, given, device, backwards=backwards)
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(call).exception()
        if error is not None and not NO_KERNEL.search(str(error)):
            # A view that few numbers do not fit, say, or what changes its input. The next call of
            # it may tell.
            return not backwards or _has_kernel(func, given, tensors, device, backwards=False)
        _KERNELS[key] = error is None
    return _KERNELS[key]


def _call_on_few(func: Any, given: Any, device: Any, *, backwards: bool) -> None:
    leaves = []

    def few(x: Any) -> Any:
        if isinstance(x, torch.device):
            return device
        if isinstance(x, int):  # a size, say
            return min(x, _FEW)
        if not isinstance(x, torch.Tensor):
            return x
        # An integer may be an index: a GPU ends the process at a 1 where an axis has length 1.
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


def _kept_apart(value: Any) -> Any:
    value = value.value if isinstance(value, keras.Variable) else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _squares(values: Sequence[Any], divisor: Any) -> Any:
    """Return for each tensor the sum of the squares of its quotients, in float64."""
    # In which no number that a scale has made large overflows when it is squared. Apple's GPUs
    # have none.
    wide = torch.float32 if values[0].device.type == "mps" else torch.float64
    norms = [torch.linalg.vector_norm(v, dtype=wide) for v in values]
    return torch.square(torch.stack(norms) / divisor)


@torch.no_grad()
def _sums(values: Sequence[Any]) -> list[Any]:
    """Return for each tensor a sum over it that is finite only if all of it is."""
    float32, float64 = torch.float32, torch.float64
    small, sizes, sums = [], [], []
    for value in values:
        size = value.numel()
        if size <= _SMALL and value.dtype is float32:
            small.append(value)
            sizes.append(size)
        else:
            sums.append(value.sum(dtype=float64 if value.dtype is float64 else float32))
    # torch's own DistributedDataParallel is made of it; what is public is a loop in Python.
    flatten = torch._C._nn.flatten_dense_tensors  # noqa: SLF001 - see above
    parts = in_parts(small, sizes, _SMALL)
    return [*sums, *(flatten(some).sum() for some in parts)]


def _largest(tensors: list[Any]) -> list[Any]:
    """Return the largest absolute value in each tensor, NaN if there is one."""
    if tensors[0].is_cpu:  # where the norm takes four times as long
        return [torch.stack(torch.aminmax(x)).abs().amax() for x in tensors]
    # Torch's own optimizers are made of it, and there is no public name.
    return list(torch._foreach_norm(tensors, float("inf")))  # noqa: SLF001 - see above


def _parts(weights: Sequence[Weight], *, scratch: bool = True) -> Iterator[Sequence[list[Any]]]:
    """Yield, for one part of all weights after the other, what their update is made of.

    Args:
        weights: The weights.
        scratch: Whether the update keeps tensors of the size of a part.

    Yields:
        Lists of variables, of gradients and of each moment. A variable that decays has done so.
    """
    for weight in weights:
        if weight.decay is not None:
            weight.variable.value.mul_(1 - weight.decay)
    moments = [values_of(kept) for kept in zip(*[w.moments for w in weights], strict=True)]
    variables, gradients = values_of([w.variable for w in weights]), [w.gradient for w in weights]
    ready = {g.dtype for g in gradients} == {torch.float32} and all(
        map(torch.Tensor.is_contiguous, gradients)
    )
    sizes = [v.numel() for v in variables]
    if ready and not scratch and sum(sizes) <= _IN_CACHE:
        yield [variables, gradients, *moments]
        return
    rows = list(zip(variables, gradients, *moments, strict=True))
    if variables[0].is_cpu and max(sizes) > _IN_CACHE:
        rows = [piece for row in rows for piece in _pieces(row)]
        sizes = [row[0].numel() for row in rows]
    for part in in_parts(rows, sizes, _IN_CACHE if ready and not scratch else max(sizes)):
        variables, gradients, *moments = (list(column) for column in zip(*part, strict=True))
        if not ready:
            gradients = [g.to(torch.float32).contiguous() for g in gradients]
        yield [variables, gradients, *moments]


def _pieces(row: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Cut the tensors of a large weight, but where its gradient has other strides."""
    if row[1].numel() <= _IN_CACHE or not row[1].is_contiguous():
        yield row
        return
    yield from zip(*(tensor.view(-1).split(_IN_CACHE) for tensor in row), strict=True)


def _generators() -> list[Any]:
    # The default generators of devices that are in use; asking for others would initialise them.
    used = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *used]
