"""What kerasmp asks of a framework, with the answer that holds for most of them."""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import keras
from keras import ops

from kerasmp.backend.keras_internals import compute_output_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Return Keras's name of a dtype of any kind. Keras looks it up by its text each time."""
    return str(keras.backend.standardize_dtype(dtype))


def accumulation_dtype(values: Any) -> str:
    """Return float64 for float64 tensors, float32 for all others."""
    return "float64" if dtype_name(values.dtype) == "float64" else "float32"


# A tensor of the framework; a gradient may be a sparse one instead, or None.
Tensor = Any


class Weight(NamedTuple):
    """What a fused update takes of one variable, all of it dense and float32.

    Attributes:
        variable: The `keras.Variable`.
        gradient: A tensor, which is left as it is.
        moments: What the optimizer keeps of the variable.
        decay: By which part of itself the variable shrinks before the update, a scalar; or None.
    """

    variable: Any
    gradient: Tensor
    moments: tuple[Any, ...]
    decay: Tensor | None


def in_parts(items: Sequence[Any], sizes: Sequence[int], largest: int) -> Iterator[list[Any]]:
    """Cut items into parts, none larger than `largest`, but for a single larger item."""
    some: list[Any] = []
    size = 0
    for item, more in zip(items, sizes, strict=True):
        size += more
        if some and size > largest:
            yield some
            some, size = [], more
        some.append(item)
    if some:
        yield some


def finite_sums(squares: Sequence[Tensor], norm: str) -> Tensor:
    """Return for each sum of squares whether its root is finite, or that of all and else not by it.

    Args:
        squares: Scalars, one for each tensor.
        norm: "each" or "all".
    """
    dtype = "float64" if "float64" in map(accumulation_dtype, squares) else "float32"
    sums = ops.stack([ops.cast(s, dtype) for s in squares])
    if norm == "each":
        return ops.isfinite(sums)
    # Where a sum overflows, one of its terms is more than the share of each.
    return ops.logical_or(ops.isfinite(sums * len(squares)), ops.isfinite(ops.sum(sums)))


class Backend(Protocol):
    """The parts of kerasmp that differ between frameworks; `kerasmp.backend.current()` has them."""

    LOSS_VISIBLE_IN_APPLY: bool = True
    """Whether the loss that `scale_loss` sees can be read when the gradients are applied."""

    NEEDS_PURE_STEP: bool = False
    """Whether a step must be a pure function, which is then compiled."""

    SUMS_IN_COMPUTE_DTYPE: bool = False
    """Whether the gradient of what is broadcast, or used in each step of a loop, is summed in its
    own dtype, and not in float32. Not of all that is broadcast, perhaps, nor in each dtype."""

    GRU_SUMS_IN_COMPUTE_DTYPE: bool = False
    """Whether Keras has a loop of its own for a GRU, no cuDNN, that sums gradients so."""

    AUTOCASTS_NESTED_LAYERS: bool = True
    """Whether a traced layer inside another one reads its variables as its policy says."""

    HAS_FUSED_UPDATES: bool = False
    """Whether there are `adam` and `sgd`."""

    MATERIALIZES_QUOTIENTS: bool = False
    """Whether quotients that are used twice, as clipping by their norm does, stay in memory."""

    PRODUCTS: tuple[tuple[Any, str], ...]
    """The products that a user's layer may call itself, each a module and a name in it."""

    COMPILED: tuple[tuple[Any, str, Callable[..., Any]], ...] = ()
    """What runs what is compiled, each a class and a method, and what takes the place of that while
    a call is watched: a function of what watches and of the method."""

    # ------------------------------------------------------------------------------- computing

    def convolution_dtype(self, dtype: str) -> str:
        """Return the dtype in which convolutions compute whose inputs have `dtype`."""
        return dtype

    def without_kernel(self, dtype: str) -> tuple[str, ...]:  # noqa: ARG002 - for those that lack some
        """Return the names of the stock layers that fail in a dtype, in a call or its gradient."""
        return ()

    def rnn_dtype(self, dtype: str) -> str:
        """Return the dtype for a whole LSTM or GRU that computes in `dtype`."""
        return dtype

    def add_bias(self, outputs: Tensor, bias: Any) -> Tensor:
        """Return a sum, for whose gradient the one of the outputs is summed in float32.

        Args:
            outputs: What a layer has computed so far.
            bias: A tensor or variable of a shape that broadcasts to theirs. Where
                `SUMS_IN_COMPUTE_DTYPE`, it is not cast to their dtype.
        """
        if self.SUMS_IN_COMPUTE_DTYPE:
            bias = ops.cast(bias, accumulation_dtype(bias))
        return ops.add(outputs, bias)

    def rows(self, table: Any, ids: Tensor) -> Tensor:
        """Return the rows of a table, a variable or a tensor, of which no copy is made."""
        return ops.take(table, ids, axis=0)

    @abstractmethod
    def matmul_to_dtype(self, left: Tensor, right: Tensor, dtype: str) -> Tensor:
        """Return the matrix product in `dtype`, without rounding it to that of the factors."""

    def has_flash_attention(
        self,
        query: Tensor,  # noqa: ARG002 - for those that have it
        key: Tensor,  # noqa: ARG002
        value: Tensor,  # noqa: ARG002
        *,
        is_causal: bool,  # noqa: ARG002
    ) -> bool:
        """Return whether Keras would use flash attention here if it were left to choose."""
        return False

    @abstractmethod
    def is_mixed_dtype_error(self, error: Exception) -> bool:
        """Return whether an error says that operands of different float dtypes met."""

    def trace(
        self,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        *,
        backwards: bool,  # noqa: ARG002 - where a gradient may lack what it needs
    ) -> None:
        """Trace a call, which changes nothing, and raise what it raises, or would when it runs.

        The latter has the name of the operation, with those of the layers around it, as its note.

        Args:
            call: What is called: a layer, or a function that calls one.
            args: Its positional arguments, with symbolic tensors in the place of tensors.
            kwargs: Its other arguments, likewise.
            backwards: Whether gradients of what it returns are traced, too.
        """
        compute_output_spec(call, *args, **kwargs)

    @abstractmethod
    def eagerly(self) -> AbstractContextManager[Any]:
        """Let all be computed when it is called, and nothing be recorded."""

    # ------------------------------------------------------------------------------- gradients

    def dense_values(self, gradient: Any) -> Tensor:
        """Return the numbers of a gradient, a sparse one without densifying it."""
        return gradient

    def replace_values(self, gradient: Any, values: Tensor) -> Any:  # noqa: ARG002 - for sparse ones
        """Return `gradient` with other numbers at the same places."""
        return values

    def quotient(self, values: Tensor, divisor: Tensor) -> Tensor:
        """Return a tensor divided by a scalar, in float32, or float64 if it came so."""
        dtype = accumulation_dtype(values)
        return ops.divide(ops.cast(values, dtype), ops.cast(divisor, dtype))

    def dtypes_of(self, variables: Sequence[Any]) -> list[str]:
        """Return Keras's name of the dtype of each variable."""
        return [dtype_name(v.dtype) for v in variables]

    def shapes_of(self, variables: Sequence[Any]) -> list[Any]:
        """Return the shape of each variable, to be compared with that of its gradient."""
        return [v.shape for v in variables]

    def is_variable(self, value: Any) -> bool:
        """Return whether an optimizer can update it."""
        return isinstance(value, keras.Variable)

    @abstractmethod
    def is_gradient(self, gradient: Any, shape: Any) -> bool:
        """Return whether something is, as it is, a gradient of that shape; None is any shape.

        No for what is one only once it is converted or broadcast.
        """

    def are_gradients(self, grads: Sequence[Any], variables: Sequence[Any]) -> bool:  # noqa: ARG002 - see below
        """Return whether all are, as they are, gradients of their variables, or None.

        Where it is not quick to tell: no.
        """
        return False

    def static_shape(self, values: Tensor) -> tuple[int | None, ...] | None:
        """Return the shape of a tensor as far as it is known, or None."""
        return tuple(values.shape)

    def branch_if_cheap(
        self,
        state: dict[str, Tensor],  # noqa: ARG002 - where branches are cheap
        allowed: Callable[[dict[str, Any]], Any],  # noqa: ARG002 - see above
        quick: Callable[[], Any],  # noqa: ARG002 - see above
        whole: Callable[[], Any],
    ) -> Any:
        """Return `quick()` where that is allowed and a branch costs less than all of `whole()`.

        Args:
            state: What `allowed` goes by, scalar tensors.
            allowed: Takes the state, as tensors or numbers; returns a scalar bool, or None for no.
            quick: Returns the same as `whole`, where it is allowed.
            whole: Is called elsewhere.
        """
        return whole()

    def fits_fused_kernels(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[bool]:  # noqa: ARG002 - for those with any
        """Return whether fused kernels take each gradient, and its variable as it lies in memory.

        They compute in float32, so that no wider gradient is among them.
        """
        return [False] * len(grads)

    def can_split_update(self) -> bool:
        """Return whether Keras may update some variables of a step, and fused kernels others."""
        return True

    @abstractmethod
    def finite_per_tensor(
        self,
        values: Sequence[Tensor],
        dtypes: Sequence[str],
        scale: Tensor,
        *,
        norm: str | None,
    ) -> Tensor:
        """Return for each tensor whether all of it is finite once it is divided by the scale.

        Args:
            values: Tensors of any shape.
            dtypes: The dtype that each quotient must fit.
            scale: float32 scalar.
            norm: Of what the norm must be finite, too, since it is clipped by: "each" tensor of
                quotients, or "all"; or None.

        Returns:
            A bool vector.
        """

    def all_finite(
        self,
        values: Sequence[Tensor],
        dtypes: Sequence[str],
        scale: Tensor,
        *,
        norm: str | None,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return whether `finite` says so of all tensors, a scalar, and what returns it of each."""
        found = self.finite_per_tensor(values, dtypes, scale, norm=norm)
        return ops.all(found), lambda: found

    def finite_norm(self, values: Sequence[Tensor], scale: Tensor, norm: str) -> Tensor:
        """Return for each tensor whether the norm of quotients is finite, or else not by its fault.

        See `finite` for the arguments.
        """
        squares = [ops.sum(ops.square(self.quotient(v, scale))) for v in values]
        return finite_sums(squares, norm)

    def norms(self, values: Sequence[Tensor], scale: Tensor) -> Tensor:
        """Return the norm of each tensor of quotients, a vector; where `MATERIALIZES_QUOTIENTS`."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------- places

    def trace_context(self) -> tuple[Any, Any]:
        """Return what tells this replica and this trace from others; None in eager code."""
        return None, None

    def require_pure_step(self) -> None:
        """Raise where a step cannot be a pure function: where it changes variables in place."""

    def has_single_replica(self) -> bool:
        """Return whether no other process or device has a part in this step."""
        return True

    def require_replica_context(self) -> None:
        """Raise where gradients have no replica."""

    def all_reduce(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],  # noqa: ARG002 - for those with replicas
        losses: Sequence[Tensor],
    ) -> tuple[Sequence[Any], Sequence[Tensor]]:
        """Return the gradients and the losses as all replicas see them."""
        return grads, losses

    def is_traced(self) -> bool:
        """Return whether a function is traced here, which will run again without this code."""
        return False

    def is_jit_constant(self, value: Any) -> bool:  # noqa: ARG002 - for those that do
        """Return whether a traced function that reads `value` here keeps it for all its calls."""
        return False

    # ---------------------------------------------------------------------------------- a step

    def run_step(
        self,
        step: Any,
        finite: Tensor,
        update: Callable[[Any, Tensor | None], None],
        advance: Callable[[Any, Tensor, bool], None],
        *,
        fused: bool,
    ) -> None:
        """Update the variables if all gradients are finite, else only move the scale.

        Not on JAX, which branches in pure code alone.

        Args:
            step: What `update` and `advance` are given, in each replica its own.
            finite: Bool vector, whether each gradient is finite; equal in all replicas.
            update: Called with `step` and None in each replica if all is finite; or, if it is
                fused, with `step` and whether all is finite, upon which it changes nothing if not.
            advance: Called once with `step`, `finite` and whether the step was applied.
            fused: Whether `update` uses `adam` or `sgd`.
        """
        raise NotImplementedError

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a pure step, compiled at its first call where that pays."""
        return step

    def sum_of_squares(self, values: Sequence[Tensor], divisor: Tensor) -> Tensor:
        """Return the sum of the squares of all quotients, a float32 scalar."""
        raise NotImplementedError

    def adam(  # noqa: PLR0913, PLR0917 - what Adam is made of
        self,
        weights: Sequence[Weight],
        divisor: Tensor,
        alpha: Tensor,
        betas: tuple[float, float],
        epsilon: float,
        applied: Tensor | None,
    ) -> None:
        """Update variables and their moments as `keras.optimizers.Adam` does.

        Args:
            weights: The variables, with their gradients and both moments.
            divisor: What the gradients are divided by.
            alpha: The step size, corrected for the moments' beginning at 0.
            betas: How much of each moment is kept.
            epsilon: Added to the root of the second moment.
            applied: None, or a scalar bool tensor: whether anything shall change.
        """
        raise NotImplementedError

    def sgd(
        self,
        weights: Sequence[Weight],
        rate: Tensor,
        momentum: float,
        applied: Tensor | None,
        *,
        nesterov: bool,
    ) -> None:
        """Update variables as `keras.optimizers.SGD` does.

        Args:
            weights: The variables, with their gradients and, unless `momentum` is 0, a moment.
            rate: What the gradients are multiplied by: the learning rate over the divisor.
            momentum: How much of the moment is kept.
            applied: None, or a scalar bool tensor: whether anything shall change.
            nesterov: Whether the moment is applied once more.
        """
        raise NotImplementedError

    def all_reduce_once(self, optimizers: Sequence[Any]) -> None:
        """Keep optimizers from summing over replicas once more what a step has summed."""

    @abstractmethod
    def initialize_from(self, variable: Any, other: Any) -> None:
        """Give a variable that holds nothing but zeros the value of another one."""

    def unshare_memory(self, variable: Any, other: Any) -> None:
        """Give a variable memory of its own where it shares that of another one."""

    @abstractmethod
    def train_step(
        self,
        model: Any,
        optimizers: Sequence[Any],
        step: Callable[..., Any],
        logs_after: Callable[[Any, Any], Any],
        *args: Any,
    ) -> Any:
        """Run a train step and undo its traces if an optimizer skipped.

        Args:
            model: The model.
            optimizers: Those of ours that the step may use.
            step: The step, which takes `args` and returns what Keras's own does.
            logs_after: Makes of the logs, and whether the step was skipped, those to return.
            *args: The batch; before it on JAX the state.
        """

    # ------------------------------------------------------------------------------- variables

    def reading(self, model: Any) -> AbstractContextManager[Any]:  # noqa: ARG002 - for JAX
        """Let the state of a model's optimizer read as it is now, during `fit`, too."""
        return contextlib.nullcontext()

    @abstractmethod
    def in_dtype(self, value: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
        """Return what a variable holds in another dtype, and what puts back what this changed."""
