"""The torch backend."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import keras
import torch

from kerasmp.backend.keras_internals import copy_mask, non_trainable_state, values_of
from kerasmp.backend.tensors import chunks, dtype_name, finite_norms
from kerasmp.backend.torch_fused import FusedUpdates
from kerasmp.backend.torch_tracing import Tracing, default_generators

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MIXED_DTYPES = re.compile(
    r"to have the same dtype, but got|expected scalar type (Half|BFloat16|Float) but found"
    r"|Input type \(.*\) and (weight|bias) type \(.*\) should be the same"
)

# Copying tensors up to this size into one costs less than checking them one by one.
_SMALL = 2**14


class Torch(FusedUpdates, Tracing):
    """The torch backend; see `Backend`."""

    AUTOCASTS_NESTED_LAYERS = False
    MATMUL_FUNCTIONS = tuple(
        (torch, name) for name in ("matmul", "inner", "vdot", "einsum", "tensordot")
    )

    # -------------------------------------------------------------------------------- layers

    def rnn_dtype(self, dtype: str) -> str:
        """Return the dtype in which to run a whole LSTM or GRU whose compute dtype is `dtype`.

        torch's CPU loop sums the gradients of kernels over the time steps in the compute dtype.
        """
        half = dtype in {"float16", "bfloat16"} and not torch.cuda.is_available()
        return "float32" if half else dtype

    def matmul_to_dtype(self, left: Any, right: Any, dtype: str) -> Any:
        """Return the matrix product in `dtype`, without rounding it to the dtype of the factors."""
        # torch has no kernel with a gradient that turns float16 into float32.
        wide = getattr(torch, dtype)
        return torch.matmul(left.to(wide), right.to(wide))

    def has_flash_attention(self, query: Any, key: Any, value: Any, *, is_causal: bool) -> bool:
        """Return whether Keras, if it may choose, uses flash attention for these inputs."""
        # Keras's own choice, for which there is no public function.
        from keras.src.backend.torch.nn import _can_use_flash_attention

        heads_first = [x.transpose(1, 2) for x in (query, key, value)]
        return bool(_can_use_flash_attention(*heads_first, None, is_causal))

    def layers_without_kernel(self, dtype: str) -> tuple[str, ...]:
        """Return the names of the stock layers whose call or gradient fails in a dtype."""
        if dtype not in {"float16", "bfloat16"}:
            return ()
        return ("CutMix",) if torch.cuda.is_available() else ("AveragePooling3D", "CutMix")

    def is_mixed_dtype_error(self, error: Exception) -> bool:
        """Return whether an error says that operands have different float dtypes."""
        return isinstance(error, RuntimeError) and _MIXED_DTYPES.search(str(error)) is not None

    # ----------------------------------------------------------------------------- gradients

    def vjp(
        self, function: Callable[..., Sequence[Any]], tensors: Sequence[Any]
    ) -> tuple[Sequence[Any], Callable[[Sequence[Any]], list[Any]]]:
        """Call a function eagerly, and return its outputs and its vector-Jacobian product."""
        leaves = [copy_mask(each, each.detach().requires_grad_()) for each in tensors]
        with torch.enable_grad():
            outputs = function(*leaves)

        def product(gradients: Sequence[Any]) -> list[Any]:
            pairs = zip(outputs, gradients, strict=True)
            depend = [(output, each) for output, each in pairs if output.requires_grad]
            if not depend:
                return [None] * len(leaves)
            ends, given = zip(*depend, strict=True)
            return list(torch.autograd.grad(ends, leaves, given, allow_unused=True))

        return [output.detach() for output in outputs], product

    def run_train_step(self, model: Any, data: Any) -> Any:
        """Run a model's train step eagerly, and return its logs. Gradients of weights stay."""
        held = [variable.value for variable in model.trainable_variables]
        before = [value.grad for value in held]
        try:
            with torch.enable_grad():
                return super().run_train_step(model, data)
        finally:
            for value, gradient in zip(held, before, strict=True):
                value.grad = gradient

    def tap(self, tensor: Any, callback: Callable[[Any, Any], None]) -> Any:
        """Return a tensor whose gradient is reported while it is computed eagerly."""
        if not tensor.requires_grad:
            return tensor
        tapped = tensor.view_as(tensor)
        tapped.register_hook(lambda gradient: callback(tensor.detach(), gradient))
        return tapped

    def dtypes_of(self, variables: Sequence[Any]) -> list[str]:
        """Return Keras's name for the dtype of each variable."""
        return [dtype_name(v.dtype) for v in values_of(variables)]

    def shapes_of(self, variables: Sequence[Any]) -> list[Any]:
        """Return the shape of each variable, of a type that equals the shape of its gradient."""
        return [v.shape for v in values_of(variables)]

    def is_gradient(self, gradient: Any, shape: Any) -> bool:
        """Return whether `gradient` is a float tensor of `shape`, or of any shape for None."""
        is_float = type(gradient) is torch.Tensor and gradient.is_floating_point()
        return is_float and (shape is None or gradient.shape == shape)

    def are_gradients(self, grads: Sequence[Any], variables: Sequence[Any]) -> bool:
        """Return whether each gradient is None or a float tensor of its variable's shape."""
        return all(
            g is None or (type(g) is torch.Tensor and g.is_floating_point() and g.shape == v.shape)
            for g, v in zip(grads, values_of(variables), strict=True)
        )

    def finite_per_tensor(
        self,
        values: Sequence[Any],
        dtypes: Sequence[str],
        scale: Any,
        *,
        norm: str | None,
    ) -> Any:
        """Return for each tensor whether all its values are finite after division by the scale."""
        quick = values[0].is_cpu and "float16" not in dtypes and not norm and scale >= 1
        # A sum is inf or NaN if one of its terms is, and takes half the time. It also overflows
        # for huge finite values; then every value is checked.
        if quick and bool(torch.isfinite(torch.stack(_sums(values))).all()):
            return torch.ones(len(values), dtype=torch.bool)
        plain = [v.detach() if v.numel() else v.new_zeros(1) for v in values]
        wide = [torch.float64 if v.dtype == torch.float64 else torch.float32 for v in plain]
        if norm and "float16" not in dtypes:
            # A finite norm implies finite values.
            return self.finite_norm_per_tensor(plain, scale, norm)
        quotients = [
            (x.to(w) / scale).to(getattr(torch, dtype))
            for x, w, dtype in zip(_largest(plain), wide, dtypes, strict=True)
        ]
        found = torch.stack([torch.isfinite(x) for x in quotients])
        return found & self.finite_norm_per_tensor(plain, scale, norm) if norm else found

    def finite_norm_per_tensor(self, values: Sequence[Any], scale: Any, norm: str) -> Any:
        """Return for each tensor whether it keeps the norm of the quotients finite."""
        squares = zip(_squares(values, scale), values, strict=True)
        wide = [s.to(torch.promote_types(v.dtype, torch.float32)) for s, v in squares]
        return finite_norms(wide, norm)

    @torch.no_grad()
    def sum_of_squares(self, values: Sequence[Any], divisor: Any) -> Any:
        """Return the sum of the squares of all quotients, a float32 scalar."""
        return _squares(values, divisor).sum().to(torch.float32)

    # ------------------------------------------------------------------------------ the step

    def branch_if_cheap(
        self,
        state: dict[str, Any],
        allowed: Callable[[dict[str, Any]], Any],
        quick: Callable[[], Any],
        whole: Callable[[], Any],
    ) -> Any:
        """Return `quick()` if the state is on a CPU and allows it; reading a GPU would wait."""
        on_cpu = all(value.is_cpu for value in state.values())
        is_allowed = on_cpu and allowed({key: value.item() for key, value in state.items()})
        return quick() if is_allowed else whole()

    def run_step(
        self,
        step: Any,
        finite: Any,
        update: Callable[[Any, Any], None],
        advance: Callable[[Any, Any, bool], None],
        *,
        fused: bool,  # noqa: ARG002 - eager code branches before both kinds of update
    ) -> None:
        """Update the variables if all gradients are finite; advance the scale in any case.

        Eager code branches on the host: one flag is read from the device in each step, as in
        PyTorch's own GradScaler.
        """
        with torch.no_grad():
            applied = bool(finite.all())
            if applied:
                update(step, None)
            advance(step, finite, applied)

    def train_step(
        self,
        model: Any,
        optimizers: Sequence[Any],
        step: Callable[..., Any],
        logs_after: Callable[[Any, Any], Any],
        data: Any,
    ) -> Any:
        """Run a train step, and undo its side effects if an optimizer skipped it."""
        guarded = [*non_trainable_state(model), *model.metrics_variables]
        before = [value.detach().clone() for value in values_of(guarded)]
        # Dropout without a seed draws from torch's own generators, not from a Keras variable.
        generators = {each: each.get_state() for each in default_generators()}
        # A clone, because `skips()` is a view of the variable. An optimizer may not be built yet.
        skips = [o.skips().clone() if o.built else 0 for o in optimizers]
        logs = step(data)
        pairs = zip(optimizers, skips, strict=True)
        skipped = any(bool(o.skips() > number) for o, number in pairs if o.built)
        if not skipped:
            return logs
        # A result may be the very tensor of a metric's variable.
        logs = keras.tree.map_structure(_cloned, logs)
        with torch.no_grad():
            for variable, value in zip(guarded, before, strict=True):
                variable.assign(value)
        for generator, state in generators.items():
            generator.set_state(state)
        return logs_after(logs, skipped)

    # ----------------------------------------------------------------------------- variables

    def initialize_from(self, variable: Any, other: Any) -> None:
        """Assign the value of `other` to a variable that holds only zeros."""
        with torch.no_grad():
            if not variable.value.any():
                variable.assign(other.value)

    def cast_variable(self, parameter: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
        """Cast a parameter in place, as `torch.nn.Module.to` does.

        Layers, their containers and torch's own optimizers keep the same object. Its gradient,
        which would not fit, is dropped.

        Returns:
            The parameter, and a function that restores its data and its gradient.
        """
        before, gradient = parameter.data, parameter.grad
        data = before.to(getattr(torch, dtype))
        parameter.grad = None
        parameter.data = data

        def undo() -> None:
            parameter.grad = None
            parameter.data = before
            parameter.grad = gradient

        return parameter, undo


def _cloned(value: Any) -> Any:
    value = value.value if isinstance(value, keras.Variable) else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _squares(values: Sequence[Any], divisor: Any) -> Any:
    """Return for each tensor the sum of the squares of its quotients, in float64."""
    # In float64, the square of no scaled gradient overflows. Apple's GPUs have no float64.
    wide = torch.float32 if values[0].device.type == "mps" else torch.float64
    norms = [torch.linalg.vector_norm(v, dtype=wide) for v in values]
    return torch.square(torch.stack(norms) / divisor)


@torch.no_grad()
def _sums(values: Sequence[Any]) -> list[Any]:
    """Return sums that are finite only if all tensors are."""
    float32, float64 = torch.float32, torch.float64
    small, sizes, sums = [], [], []
    for value in values:
        size = value.numel()
        if size <= _SMALL and value.dtype is float32:
            small.append(value)
            sizes.append(size)
        else:
            sums.append(value.sum(dtype=float64 if value.dtype is float64 else float32))
    # DistributedDataParallel uses this function; the public one is a loop in Python.
    flatten = torch._C._nn.flatten_dense_tensors  # noqa: SLF001 - see above
    return [*sums, *(flatten(chunk).sum() for chunk in chunks(small, sizes, _SMALL))]


def _largest(tensors: list[Any]) -> list[Any]:
    """Return the largest absolute value in each tensor, NaN if it contains one."""
    if tensors[0].is_cpu:  # where the norm takes four times as long
        return [torch.stack(torch.aminmax(x)).abs().amax() for x in tensors]
    # torch's own optimizers use this function, and there is no public one.
    return list(torch._foreach_norm(tensors, float("inf")))  # noqa: SLF001
