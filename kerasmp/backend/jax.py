"""The JAX backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import jax
import keras
import numpy as np
from jax import numpy as jnp

from kerasmp.backend.jax_tracing import Tracing
from kerasmp.backend.optimizer_internals import optimizer_state_in_fit
from kerasmp.backend.running_steps import running_step
from kerasmp.backend.tensors import accumulation_dtype, finite_norms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


# Checking a tensor up to this size takes less time than starting its own kernel. Small tensors are
# joined up to the second size, half a megabyte.
_SMALL, _JOINED = 2**14, 2**17


class Jax(Tracing):
    """The JAX backend; see `Backend`."""

    # scale_loss runs inside the differentiated function, and the loss does not leave it.
    LOSS_VISIBLE_IN_APPLY = False
    DIFFERENTIATES_BY_LOGITS = False
    NEEDS_PURE_STEP = True
    SUMS_IN_COMPUTE_DTYPE = True
    GRU_SUMS_IN_COMPUTE_DTYPE = True
    MATERIALIZES_QUOTIENTS = True
    MATMUL_FUNCTIONS = tuple(
        (jnp, name) for name in ("matmul", "dot", "inner", "vdot", "einsum", "tensordot")
    )

    # -------------------------------------------------------------------------------- layers

    def matmul_to_dtype(self, left: Any, right: Any, dtype: str) -> Any:
        """Return the matrix product in `dtype`, without rounding it to the dtype of the factors.

        The factors are not cast, so that a GPU multiplies float16 values in its tensor cores.
        """
        return jnp.matmul(left, right, preferred_element_type=dtype)

    def has_flash_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        is_causal: bool,  # noqa: ARG002 - does not matter on JAX
    ) -> bool:
        """Return whether Keras, if it may choose, uses flash attention for these inputs."""
        # Keras's own choice, for which there is no public function.
        from keras.src.backend.jax.nn import _can_use_flash_attention

        return bool(_can_use_flash_attention(query, key, value, None))

    def is_mixed_dtype_error(self, error: Exception) -> bool:
        """Return whether an error says that operands have different float dtypes."""
        message = "requires arguments to have the same dtypes"
        return isinstance(error, TypeError) and message in str(error)

    # ----------------------------------------------------------------------------- gradients

    def vjp(
        self, function: Callable[..., Sequence[Any]], tensors: Sequence[Any]
    ) -> tuple[Sequence[Any], Callable[[Sequence[Any]], list[Any]]]:
        """Call a function eagerly, and return its outputs and its vector-Jacobian product."""
        outputs, product = jax.vjp(lambda *each: list(function(*each)), *tensors)
        return outputs, lambda gradients: list(product(list(gradients)))

    def is_concrete(self, tensor: Any) -> bool:
        """Return whether a tensor has numbers outside of a trace and of differentiation."""
        return not isinstance(tensor, jax.core.Tracer)

    def run_train_step(self, model: Any, data: Any) -> Any:
        """Run a model's train step eagerly, and return its logs."""
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        state = tuple([variable.value for variable in group] for group in groups)
        logs, _ = model.train_step(state, data)
        return logs

    def tap(self, tensor: Any, callback: Callable[[Any, Any], None]) -> Any:
        """Return a tensor whose gradient is reported while it is computed eagerly."""

        def gradient(value: Any, upstream: Any) -> Any:
            callback(value, upstream)
            return (upstream,)

        identity = jax.custom_vjp(lambda x: x)
        identity.defvjp(lambda x: (x, x), gradient)
        return identity(tensor)

    def divide(self, values: Any, divisor: Any) -> Any:
        """Divide a tensor by a scalar in float32, or in float64 if the tensor is float64.

        XLA writes a quotient to memory, which would be a copy of all gradients, but recomputes a
        product wherever it is used. There are two factors, because a single one would be flushed to
        0 for the largest divisors. Both are exact for a power of two.
        """
        values = values.astype(accumulation_dtype(values))
        part, exponent = jnp.frexp(jnp.asarray(divisor, values.dtype))
        half = exponent // 2
        one = jnp.ones((), values.dtype)
        return values * jnp.ldexp(one, -half) * (1 / jnp.ldexp(part, exponent - half))

    def is_gradient(self, gradient: Any, shape: Any) -> bool:
        """Return whether `gradient` is a float tensor of `shape`, or of any shape for None."""
        is_float = isinstance(gradient, jax.Array) and jnp.issubdtype(gradient.dtype, jnp.floating)
        return is_float and (shape is None or gradient.shape == shape)

    def finite_per_tensor(
        self, values: Sequence[Any], dtypes: Sequence[str], scale: Any, *, norm: str | None
    ) -> Any:
        """Return for each tensor whether all its values are finite after division by the scale.

        XLA's maximum on a CPU ignores a NaN among 4,096 values or more. Zero times each value finds
        it in one pass. Finite values stay finite when they are divided by 1 or more.
        """
        if norm and "float16" not in dtypes:
            # A finite norm implies finite values.
            return self.finite_norm_per_tensor(values, scale, norm)
        # XLA must not know that this is zero, even if the scale is a constant.
        zero = jax.lax.optimization_barrier(jnp.minimum(scale, 1.0) * 0.0)

        def is_finite(value: Any, dtype: str) -> Any:
            if _is_narrow(value, dtype):  # a product would keep a float32 copy of it
                return jnp.all(jnp.isfinite(self.divide(value, scale).astype(dtype)))
            zeros = jnp.full(value.shape[-1:], zero, value.dtype)
            # Whatever precision the user has set: in a lower one, large values are inf.
            product = jnp.dot(value, zeros, precision=jax.lax.Precision.HIGHEST)
            return jnp.all(product == 0)

        def stays_finite(value: Any, dtype: str) -> Any:
            largest = jnp.max(jnp.abs(value), initial=0)
            return _is_narrow(value, dtype) or jnp.isfinite(largest / scale)

        def check(condition: Callable[[Any, str], Any]) -> Any:
            return jnp.stack([condition(v, d) for v, d in zip(values, dtypes, strict=True)])

        found = check(is_finite)
        found &= jax.lax.cond(scale >= 1, lambda: found, lambda: check(stays_finite))
        return found & self.finite_norm_per_tensor(values, scale, norm) if norm else found

    def all_finite(
        self, values: Sequence[Any], dtypes: Sequence[str], scale: Any, *, norm: str | None
    ) -> tuple[Any, Callable[[], Any]]:
        """Return whether all tensors are finite, a scalar, and a function for `finite_per_tensor`.

        Small tensors are checked together, because a kernel for each takes longer to start than to
        run. XLA keeps in memory what a branch uses, so the function reuses these results.
        """
        small, joined_size = [], 0
        for i, value in enumerate(values):
            if _can_be_joined(value, dtypes[i]) and joined_size + value.size <= _JOINED:
                small.append(i)
                joined_size += value.size
        if norm or not small:
            return super().all_finite(values, dtypes, scale, norm=norm)
        large = [i for i in range(len(values)) if i not in small]
        joined = jnp.concatenate([values[i].ravel() for i in small])
        fine = jnp.isfinite(self.divide(joined, scale))
        rest = [values[i] for i in large], [dtypes[i] for i in large]
        found = self.finite_per_tensor(*rest, scale, norm=None) if large else jnp.ones(0, bool)

        def per_tensor() -> Any:
            # In few operations: XLA moves slices out of the branch, and runs them in each step.
            ends = np.cumsum([values[i].size for i in small])
            bad = jnp.cumsum(~fine, dtype="int32")[ends - 1]
            flags = jnp.concatenate([jnp.diff(bad, prepend=0) == 0, found])
            return flags[np.argsort([*small, *large])]

        return jnp.all(fine) & jnp.all(found), per_tensor

    def nan_per_tensor(self, values: Sequence[Any]) -> Any:
        """Return for each tensor whether it has a NaN, as a bool vector.

        A large tensor is looked at row by row: XLA would hold what `isnan` returns for it, which
        takes a quarter of the tensor, and for all tensors together.
        """

        def has_nan(value: Any) -> Any:
            return jnp.any(jnp.isnan(value))

        return jnp.stack(
            [
                jnp.any(jax.lax.map(has_nan, v)) if v.ndim > 1 and v.size > _SMALL else has_nan(v)
                for v in values
            ]
        )

    def finite_norm_per_tensor(self, values: Sequence[Any], scale: Any, norm: str) -> Any:
        """Return for each tensor whether it keeps the norm of the quotients finite.

        These are the same norms that gradients are clipped by.
        """
        return finite_norms(jnp.square(self.norms(values, scale)), norm)

    def norms(self, values: Sequence[Any], scale: Any) -> Any:
        """Return the norm of each tensor of quotients, a vector.

        XLA squares and adds in one pass. If many tensors are divided by one scalar, XLA writes a
        tensor of its copies to memory and divides by that, so each tensor gets a scalar of its own.
        """
        raw = jnp.sqrt(
            jnp.stack([jnp.sum(jnp.square(v.astype(accumulation_dtype(v)))) for v in values])
        )

        def divide_first() -> Any:
            squares = [scale]
            for each in values:
                own, squares[-1] = jax.lax.optimization_barrier((scale, squares[-1]))
                squares.append(jnp.sum(jnp.square(self.divide(each, own))))
            return jnp.sqrt(jnp.stack(squares[1:])).astype(raw.dtype)

        # The norm of finite values may overflow, and be finite after the division.
        plain = jnp.all(jnp.isfinite(raw)) & (scale >= 1)
        return jax.lax.cond(plain, lambda: (raw / scale).astype(raw.dtype), divide_first)

    # ------------------------------------------------------------------------------ the step

    def compile_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return `step`, compiled on its first call."""
        return cast("Callable[..., Any]", jax.jit(step))

    def train_step(
        self,
        model: Any,
        optimizers: Sequence[Any],
        step: Callable[..., Any],
        logs_after: Callable[[Any, Any], Any],
        *args: Any,
    ) -> tuple[Any, Sequence[Any]]:
        """Run a pure train step, and undo its side effects if the optimizer skipped it.

        Args:
            model: The model.
            optimizers: The model's `LossScaleOptimizer`s. The state is that of `model.optimizer`.
            step: Called as `step(state, data)`; returns logs and state.
            logs_after: Called as `logs_after(logs, skipped)`; returns the logs to report.
            *args: The state that Keras passes: trainable, non-trainable, optimizer and metrics
                variables; and the batch.

        Returns:
            The logs and the new state.
        """
        if not any(o is model.optimizer for o in optimizers):
            return cast("tuple[Any, Sequence[Any]]", step(*args))
        (_, before, optimizer_before, metrics_before), _ = args
        logs, (trainable, after, optimizer, metrics_after) = step(*args)
        running = running_step(model)
        with _scope(model.optimizer.variables, optimizer_before):
            skips = model.optimizer.skips()
        with _scope(model.optimizer.variables, optimizer):
            skipped = model.optimizer.skips() != skips
        if running and running.losses:
            # The loss that the metrics received: unscaled, and outside of differentiation.
            finite = jnp.all(jnp.isfinite(running.losses[-1]))
            optimizer = model.optimizer.with_known_loss(optimizer_before, optimizer, finite)
        after = _choose(skipped, before, after)
        metrics = _choose(skipped, metrics_before, metrics_after)
        with _scope(model.metrics_variables, metrics):
            logs = logs_after(logs, skipped)
        return logs, (trainable, after, optimizer, metrics)

    # ----------------------------------------------------------------------------- variables

    def initialize_from(self, variable: Any, other: Any) -> None:
        """Assign the value of `other` to a variable that holds only zeros."""
        if not jnp.any(variable.value):
            # A copy: a train step donates both buffers, and must not donate one twice.
            variable.assign(jnp.copy(other.value))

    def unshare_memory(self, variable: Any, other: Any) -> None:
        """Give a variable its own buffer if it shares that of `other`.

        Keras writes averages into weights without a copy. The first step of the next `fit` would
        then donate one buffer twice, which is an error.
        """
        if variable.value is other.value:
            variable.assign(jnp.copy(other.value))

    def current_optimizer_state(self, model: Any) -> Any:
        """Return a scope in which a model's optimizer has its current state, even during `fit`.

        In `fit`, the state is passed around outside of the variables. The scope leaves the moments
        out: Keras's own method updates all variables, which takes as long as some steps of a small
        model.
        """
        state = optimizer_state_in_fit(model)
        return keras.StatelessScope([(v, x) for v, x in state if not v.shape or "int" in v.dtype])

    def cast_variable(self, value: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
        """Return an array in another dtype with the same sharding; there is nothing to undo."""
        return jax.device_put(value.astype(dtype), value.sharding), lambda: None


def _can_be_joined(value: Any, dtype: str) -> bool:
    """Return whether a tensor is small, float32 and not sharded, so that it may be concatenated."""
    sharding = getattr(getattr(value, "aval", None), "sharding", None)
    sharded = any(getattr(sharding, "spec", None) or ())
    sharded |= keras.distribution.distribution() is not None
    return not sharded and value.dtype == dtype == "float32" and 0 < value.size <= _SMALL


def _is_narrow(value: Any, dtype: str) -> bool:
    return dtype == "float16" or value.dtype.itemsize < jnp.dtype("float32").itemsize


def _scope(variables: Sequence[Any], values: Sequence[Any]) -> Any:
    return keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True)))


def _choose(skipped: Any, before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    # Values that the step did not change, such as a frozen backbone, need no choice and no kernel.
    return [
        new if new is old else jax.tree.map(lambda o, n: jnp.where(skipped, o, n), old, new)
        for old, new in zip(before, after, strict=True)
    ]
