"""The interface between kerasmp and a framework, with the defaults that suit most of them."""

from __future__ import annotations

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import keras
from keras import ops

from kerasmp.backend.tensors import Tensor, accumulation_dtype, dtype_name, finite_norms

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from kerasmp.backend.tensors import Weight


class Backend(Protocol):
    """What differs between frameworks; `kerasmp.backend.current()` returns the running one."""

    LOSS_VISIBLE_IN_APPLY: bool = True
    """Whether the loss given to `scale_loss` can still be read when the gradients are applied."""

    DIFFERENTIATES_BY_LOGITS: bool = True
    """Whether a loss on probabilities is differentiated by the logits that Keras attaches to them.
    This needs tensors that take attributes while they are differentiated."""

    NEEDS_PURE_STEP: bool = False
    """Whether a step must be a pure function, which is then compiled."""

    SUMS_IN_COMPUTE_DTYPE: bool = False
    """Whether some gradients of a value that is broadcast, or used in each step of a loop, are
    summed in the compute dtype instead of float32. This may depend on the shape and the dtype."""

    GRU_SUMS_IN_COMPUTE_DTYPE: bool = False
    """Whether Keras has its own loop for a GRU, without cuDNN, that sums gradients this way."""

    AUTOCASTS_NESTED_LAYERS: bool = True
    """Whether a layer inside a traced layer reads its variables in the dtype of its own policy."""

    HAS_FUSED_UPDATES: bool = False
    """Whether `adam` and `sgd` are implemented."""

    MATERIALIZES_QUOTIENTS: bool = False
    """Whether quotients that are used twice, as in clipping by norm, are written to memory."""

    MATMUL_FUNCTIONS: tuple[tuple[Any, str], ...]
    """The framework's matrix products that user-defined layers may call: (module, name) pairs."""

    COMPILED_CALLS: tuple[tuple[Any, str, Callable[..., Any]], ...] = ()
    """The methods that run compiled code: (class, name, replacement) triples. While a call is
    profiled, `replacement(profile, method, *args, **kwargs)` runs instead."""

    # -------------------------------------------------------------------------------- layers

    def convolution_dtype(self, dtype: str) -> str:
        """Return the dtype to compute a convolution in if its inputs have `dtype`."""
        return dtype

    def layers_without_kernel(self, dtype: str) -> tuple[str, ...]:  # noqa: ARG002 - the default needs no argument; so below
        """Return the names of the stock layers whose call or gradient fails in a dtype."""
        return ()

    def rnn_dtype(self, dtype: str) -> str:
        """Return the dtype in which to run a whole LSTM or GRU whose compute dtype is `dtype`."""
        return dtype

    def add_bias(self, outputs: Tensor, bias: Any) -> Tensor:
        """Add a bias, and sum its gradient in float32.

        Args:
            outputs: The layer's outputs so far.
            bias: A tensor or variable whose shape broadcasts to that of `outputs`. If
                `SUMS_IN_COMPUTE_DTYPE`, it is not cast to their dtype.
        """
        if self.SUMS_IN_COMPUTE_DTYPE:
            bias = ops.cast(bias, accumulation_dtype(bias))
        return ops.add(outputs, bias)

    def take_rows(self, table: Any, ids: Tensor) -> Tensor:
        """Return the rows of a table, a variable or a tensor, without copying the table."""
        return ops.take(table, ids, axis=0)

    @abstractmethod
    def matmul_to_dtype(self, left: Tensor, right: Tensor, dtype: str) -> Tensor:
        """Return the matrix product in `dtype`, without rounding it to the dtype of the factors."""

    def has_flash_attention(
        self,
        query: Tensor,  # noqa: ARG002
        key: Tensor,  # noqa: ARG002
        value: Tensor,  # noqa: ARG002
        *,
        is_causal: bool,  # noqa: ARG002
    ) -> bool:
        """Return whether Keras, if it may choose, uses flash attention for these inputs."""
        return False

    @abstractmethod
    def is_mixed_dtype_error(self, error: Exception) -> bool:
        """Return whether an error says that operands have different float dtypes."""

    # ------------------------------------------------------------------------------- tracing

    @abstractmethod
    def trace(self, call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:
        """Trace a call without side effects, and raise the errors that it raises or would raise.

        An error that would come only when the call runs, for a missing kernel, has a note: the name
        of the operation with the names of the layers around it.

        Args:
            call: A layer, or a function that calls one.
            args: Its positional arguments, with symbolic tensors in place of tensors.
            kwargs: Its keyword arguments, likewise.
            backwards: Whether to trace the gradients of the outputs, too.
        """

    def eager_scope(self) -> AbstractContextManager[Any]:
        """Return a scope in which everything runs eagerly and no gradients are recorded.

        `COMPILED_CALLS` are not covered.
        """
        return contextlib.nullcontext()

    def probe_scope(self) -> AbstractContextManager[Any]:
        """Return a scope for running layers once, in which no gradients are recorded."""
        return contextlib.nullcontext()

    def is_traced(self) -> bool:
        """Return whether this code runs in a trace, so that later calls run without it."""
        return False

    def is_jit_constant(self, value: Any) -> bool:  # noqa: ARG002
        """Return whether a function traced here would keep `value` as a constant for all calls."""
        return False

    def trace_context(self) -> tuple[Any, Any]:
        """Return keys for the current replica and the current trace, each None if there is none."""
        return None, None

    # ----------------------------------------------------------------------------- gradients

    @abstractmethod
    def vjp(
        self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Callable[[Sequence[Tensor]], list[Any]]]:
        """Call a function eagerly, and return its outputs and its vector-Jacobian product.

        Args:
            function: Called as `function(*tensors)`; returns float tensors.
            tensors: Float tensors.

        Returns:
            The outputs, and a function that can be called once: it takes a gradient for each
            output, in its dtype, and returns one for each of `tensors`, or None where the outputs
            do not depend on it.
        """

    def is_concrete(self, tensor: Tensor) -> bool:  # noqa: ARG002
        """Return whether a tensor has numbers outside of a trace and of differentiation."""
        return True

    def run_train_step(self, model: Any, data: Any) -> Any:
        """Run a model's train step eagerly, and return its logs."""
        return model.train_step(data)

    @abstractmethod
    def tap(self, tensor: Tensor, callback: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Return a tensor whose gradient is reported while it is computed eagerly.

        Args:
            tensor: A float tensor.
            callback: Called as `callback(tensor, gradient)`, if there is a gradient.
        """

    def dense_values(self, gradient: Any) -> Tensor:
        """Return the values of a gradient as a tensor; a sparse gradient is not made dense."""
        return gradient

    def to_dense(self, gradient: Any) -> Tensor:
        """Return a gradient as a tensor of the shape of its variable."""
        return gradient

    def replace_values(self, gradient: Any, values: Tensor) -> Any:  # noqa: ARG002
        """Return a gradient like `gradient` with other values; a sparse one keeps its indices."""
        return values

    def divide(self, values: Tensor, divisor: Tensor) -> Tensor:
        """Divide a tensor by a scalar in float32, or in float64 if the tensor is float64."""
        dtype = accumulation_dtype(values)
        return ops.divide(ops.cast(values, dtype), ops.cast(divisor, dtype))

    def dtypes_of(self, variables: Sequence[Any]) -> list[str]:
        """Return Keras's name for the dtype of each variable."""
        return [dtype_name(v.dtype) for v in variables]

    def shapes_of(self, variables: Sequence[Any]) -> list[Any]:
        """Return the shape of each variable, of a type that equals the shape of its gradient."""
        return [v.shape for v in variables]

    def is_variable(self, value: Any) -> bool:
        """Return whether an optimizer can update `value`."""
        return isinstance(value, keras.Variable)

    @abstractmethod
    def is_gradient(self, gradient: Any, shape: Any) -> bool:
        """Return whether `gradient` is a float tensor of `shape`, or of any shape for None.

        Values that only become one by conversion or broadcasting do not count.
        """

    def are_gradients(self, grads: Sequence[Any], variables: Sequence[Any]) -> bool:  # noqa: ARG002
        """Return whether each gradient is None or a float tensor of its variable's shape.

        Return False where the check is not cheap.
        """
        return False

    def static_shape(self, values: Tensor) -> tuple[int | None, ...] | None:
        """Return the static shape of a tensor, or None if its rank is unknown."""
        return tuple(values.shape)

    @abstractmethod
    def finite_per_tensor(
        self,
        values: Sequence[Tensor],
        dtypes: Sequence[str],
        scale: Tensor,
        *,
        norm: str | None,
    ) -> Tensor:
        """Return for each tensor whether all its values are finite after division by the scale.

        Args:
            values: Tensors of any shape.
            dtypes: For each tensor, the dtype in which its quotient must be finite.
            scale: float32 scalar.
            norm: Which norm must be finite as well, because the step clips by it: that of "each"
                tensor of quotients, or of "all" together; or None.

        Returns:
            A bool vector.
        """

    def nan_per_tensor(self, values: Sequence[Tensor]) -> Tensor:
        """Return for each tensor whether it has a NaN, as a bool vector."""
        return keras.ops.stack([keras.ops.any(keras.ops.isnan(value)) for value in values])

    def all_finite(
        self,
        values: Sequence[Tensor],
        dtypes: Sequence[str],
        scale: Tensor,
        *,
        norm: str | None,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return whether all tensors are finite, a scalar, and a function for `finite_per_tensor`.

        See `finite_per_tensor` for the arguments.
        """
        found = self.finite_per_tensor(values, dtypes, scale, norm=norm)
        return ops.all(found), lambda: found

    def finite_norm_per_tensor(self, values: Sequence[Tensor], scale: Tensor, norm: str) -> Tensor:
        """Return for each tensor whether it keeps the norm of the quotients finite.

        See `finite_per_tensor` for the arguments.
        """
        squares = [ops.sum(ops.square(self.divide(v, scale))) for v in values]
        return finite_norms(squares, norm)

    def norms(self, values: Sequence[Tensor], scale: Tensor) -> Tensor:
        """Return the norm of each tensor of quotients, a vector; if `MATERIALIZES_QUOTIENTS`."""
        raise NotImplementedError

    def sum_of_squares(self, values: Sequence[Tensor], divisor: Tensor) -> Tensor:
        """Return the sum of the squares of all quotients, a float32 scalar."""
        raise NotImplementedError

    # ------------------------------------------------------------------------- fused updates

    # Only called if `HAS_FUSED_UPDATES`.

    def fits_fused_kernels(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[bool]:
        """Return whether the fused kernels can take each gradient and its variable.

        The kernels compute in float32, so wider gradients do not fit.
        """
        raise NotImplementedError

    def can_split_update(self) -> bool:
        """Return whether a step may mix fused kernels and Keras's own update."""
        return True

    def adam(  # noqa: PLR0913, PLR0917 - the settings of Adam
        self,
        weights: Sequence[Weight],
        divisor: Tensor,
        alpha: Tensor,
        betas: tuple[float, float],
        epsilon: float,
        applied: Tensor | None,
    ) -> None:
        """Update variables and moments as `keras.optimizers.Adam` does.

        Args:
            weights: The variables, with their gradients and both moments.
            divisor: What the gradients are divided by.
            alpha: The step size, bias correction included.
            betas: The decay rates of the moments.
            epsilon: Added to the root of the second moment.
            applied: A scalar bool tensor: whether anything may change. None means yes.
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
            weights: The variables, with their gradients and, unless `momentum` is 0, one moment.
            rate: The learning rate over the divisor of the gradients.
            momentum: The decay rate of the moment.
            applied: A scalar bool tensor: whether anything may change. None means yes.
            nesterov: Whether to use Nesterov momentum.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------ the step

    def require_pure_step(self) -> None:
        """Raise if a step changes variables in place and cannot be a pure function."""

    def require_replica_context(self) -> None:
        """Raise in a cross-replica context, where a step has no gradients of its own."""

    def has_single_replica(self) -> bool:
        """Return whether no other process or device takes part in this step."""
        return True

    def all_reduce(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],  # noqa: ARG002
        losses: Sequence[Tensor],
    ) -> tuple[Sequence[Any], Sequence[Tensor]]:
        """Return the gradients and losses of all replicas."""
        return grads, losses

    def all_reduce_once(self, optimizers: Sequence[Any]) -> None:
        """Keep optimizers from summing over the replicas again what the step has summed."""

    def branch_if_cheap(
        self,
        state: dict[str, Tensor],  # noqa: ARG002
        allowed: Callable[[dict[str, Any]], Any],  # noqa: ARG002
        quick: Callable[[], Any],  # noqa: ARG002
        whole: Callable[[], Any],
    ) -> Any:
        """Return `quick()` if it is allowed and a branch is cheaper than `whole()`.

        Args:
            state: Scalar tensors.
            allowed: Takes the state as tensors or numbers. Returns whether `quick()` may run, a
                scalar bool; None means no.
            quick: Returns the same result as `whole` wherever it is allowed.
            whole: Runs in all other cases.
        """
        return whole()

    def run_step(
        self,
        step: Any,
        finite: Tensor,
        update: Callable[[Any, Tensor | None], None],
        advance: Callable[[Any, Tensor, bool], None],
        *,
        fused: bool,
    ) -> None:
        """Update the variables if all gradients are finite; advance the scale in any case.

        JAX does not implement this: it branches in pure code only.

        Args:
            step: Passed to `update` and `advance`; each replica has its own.
            finite: Bool vector, whether each gradient is finite; the same in all replicas.
            update: Called as `update(step, None)` in each replica if all is finite. A fused one may
                be called as `update(step, all_finite)` instead, and changes nothing if that is
                false.
            advance: Called once as `advance(step, finite, applied)`.
            fused: Whether `update` uses `adam` or `sgd`.
        """
        raise NotImplementedError

    def compile_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a pure step, compiled on its first call; if `NEEDS_PURE_STEP`."""
        raise NotImplementedError

    def peek(self, source: Any, steps: int) -> tuple[Any, Any]:  # noqa: ARG002
        """Return the next batch of a source, and a source that yields the same batches as before.

        Args:
            source: What Keras passes to a train function: batches, or an iterator over them.
            steps: The most batches that one call of the train function takes.

        Returns:
            The batch, or None if it cannot be had without losing it.
        """
        if isinstance(source, Sequence):
            return source[0], source
        first = list(itertools.islice(source, 1))
        return (first[0] if first else None), itertools.chain(first, source)

    @abstractmethod
    def train_step(
        self,
        model: Any,
        optimizers: Sequence[Any],
        step: Callable[..., Any],
        logs_after: Callable[[Any, Any], Any],
        *args: Any,
    ) -> Any:
        """Run a train step, and undo its side effects if an optimizer skipped it.

        Args:
            model: The model.
            optimizers: The `LossScaleOptimizer`s that the step may use.
            step: Called as `step(*args)`; returns what Keras's train step returns.
            logs_after: Called as `logs_after(logs, skipped)`; returns the logs to report.
            *args: The batch; on JAX the state comes first.
        """

    # ----------------------------------------------------------------------------- variables

    @abstractmethod
    def initialize_from(self, variable: Any, other: Any) -> None:
        """Assign the value of `other` to a variable that holds only zeros."""

    def unshare_memory(self, variable: Any, other: Any) -> None:
        """Give a variable its own memory if it shares that of `other`."""

    def current_optimizer_state(self, model: Any) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Return a scope in which a model's optimizer has its current state, even during `fit`."""
        return contextlib.nullcontext()

    @abstractmethod
    def cast_variable(self, value: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
        """Cast the framework's variable behind a `keras.Variable`.

        Returns:
            The value in the new dtype, and a function that undoes changes made in place.
        """
