"""What only JAX needs: an eager step made of the pure one, and a train step over explicit state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import jax
import keras
import numpy as np
from jax import numpy as jnp

from kerasmp.backend.calls import running
from kerasmp.backend.constants import inner_jaxprs
from kerasmp.backend.keras_internals import compute_output_spec, optimizer_in_fit
from kerasmp.backend.protocol import Backend, accumulation_dtype, finite_sums
from kerasmp.errors import BackendError

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # where it was in older JAX
    from jax.core import get_opaque_trace_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


# A tensor of so many numbers is checked in less time than its own kernel takes to start; so many
# are put together, which takes half a megabyte.
_SMALL, _TOGETHER = 2**14, 2**17


class Jax(Backend):
    """See `Backend`."""

    # scale_loss runs inside the function that is differentiated, and what it sees stays there.
    LOSS_VISIBLE_IN_APPLY = False
    # The gradient of what is broadcast or used in each step of a loop is summed in its own dtype.
    SUMS_IN_COMPUTE_DTYPE = True
    GRU_SUMS_IN_COMPUTE_DTYPE = True
    NEEDS_PURE_STEP = True
    MATERIALIZES_QUOTIENTS = True
    PRODUCTS = tuple(
        (jnp, name) for name in ("matmul", "dot", "inner", "vdot", "einsum", "tensordot")
    )

    def quotient(self, values: Any, divisor: Any) -> Any:
        """Return a tensor divided by a scalar, in float32, or float64 if it came so.

        XLA computes a product anew where it is used, but writes a quotient to memory, a copy of
        all gradients. Two factors, since one would be flushed to 0 for the largest divisors; both
        are exact for a power of two.
        """
        values = values.astype(accumulation_dtype(values))
        part, exponent = jnp.frexp(jnp.asarray(divisor, values.dtype))
        half = exponent // 2
        one = jnp.ones((), values.dtype)
        return values * jnp.ldexp(one, -half) * (1 / jnp.ldexp(part, exponent - half))

    def finite_per_tensor(
        self, values: Sequence[Any], dtypes: Sequence[str], scale: Any, *, norm: str | None
    ) -> Any:
        """Return for each tensor whether all of it is finite once it is divided by the scale.

        On a CPU the maximum of XLA ignores a NaN among 4,096 numbers or more. Zero times each
        number tells of it, in one pass; what is finite stays so if it is divided by 1 or more.
        """
        if norm and "float16" not in dtypes:
            return self.finite_norm(values, scale, norm)  # which tells of their numbers, too
        # That it is zero XLA must not know, though the scale may be a constant.
        zero = jax.lax.optimization_barrier(jnp.minimum(scale, 1.0) * 0.0)

        def is_finite(value: Any, dtype: str) -> Any:
            if _is_narrow(value, dtype):  # of which a product would keep a float32 copy
                return jnp.all(jnp.isfinite(self.quotient(value, scale).astype(dtype)))
            zeros = jnp.full(value.shape[-1:], zero, value.dtype)
            # Whatever precision the user has set: in a narrower one large numbers are inf.
            product = jnp.dot(value, zeros, precision=jax.lax.Precision.HIGHEST)
            return jnp.all(product == 0)

        def stays_finite(value: Any, dtype: str) -> Any:
            largest = jnp.max(jnp.abs(value), initial=0)
            return _is_narrow(value, dtype) or jnp.isfinite(largest / scale)

        def of_all(answer: Callable[[Any, str], Any]) -> Any:
            return jnp.stack([answer(v, d) for v, d in zip(values, dtypes, strict=True)])

        found = of_all(is_finite)
        found &= jax.lax.cond(scale >= 1, lambda: found, lambda: of_all(stays_finite))
        return found & self.finite_norm(values, scale, norm) if norm else found

    def all_finite(
        self, values: Sequence[Any], dtypes: Sequence[str], scale: Any, *, norm: str | None
    ) -> tuple[Any, Callable[[], Any]]:
        """Return whether `finite` says so of all tensors, a scalar, and what returns it of each.

        Small ones are looked at together: a kernel for each takes longer to start than to run. And
        what a branch uses XLA keeps in memory for it, so that the answer for each comes from these.
        """
        small, together = [], 0
        for i, value in enumerate(values):
            if _can_be_joined(value, dtypes[i]) and together + value.size <= _TOGETHER:
                small.append(i)
                together += value.size
        if norm or not small:
            return super().all_finite(values, dtypes, scale, norm=norm)
        large = [i for i in range(len(values)) if i not in small]
        joined = jnp.concatenate([values[i].ravel() for i in small])
        fine = jnp.isfinite(self.quotient(joined, scale))
        rest = [values[i] for i in large], [dtypes[i] for i in large]
        found = self.finite_per_tensor(*rest, scale, norm=None) if large else jnp.ones(0, bool)

        def each() -> Any:
            # In few operations: XLA takes slices out of the branch, and does them in each step.
            ends = np.cumsum([values[i].size for i in small])
            bad = jnp.cumsum(~fine, dtype="int32")[ends - 1]
            flags = jnp.concatenate([jnp.diff(bad, prepend=0) == 0, found])
            return flags[np.argsort([*small, *large])]

        return jnp.all(fine) & jnp.all(found), each

    def finite_norm(self, values: Sequence[Any], scale: Any, norm: str) -> Any:
        """Return for each tensor whether the norm of quotients is finite, or else not by its fault.

        Of the same norms as gradients are clipped by.
        """
        return finite_sums(jnp.square(self.norms(values, scale)), norm)

    def norms(self, values: Sequence[Any], scale: Any) -> Any:
        """Return the norm of each tensor of quotients, a vector.

        XLA squares and adds in one pass. What is divided by one scalar for many tensors it divides
        by a tensor of copies of it, which it writes to memory: so each has a scalar of its own.
        """
        raw = jnp.sqrt(
            jnp.stack([jnp.sum(jnp.square(v.astype(accumulation_dtype(v)))) for v in values])
        )

        def divided() -> Any:
            squares = [scale]
            for each in values:
                own, squares[-1] = jax.lax.optimization_barrier((scale, squares[-1]))
                squares.append(jnp.sum(jnp.square(self.quotient(each, own))))
            return jnp.sqrt(jnp.stack(squares[1:])).astype(raw.dtype)

        # Of what is finite the norm may be infinite, and finite again once it is divided.
        plain = jnp.all(jnp.isfinite(raw)) & (scale >= 1)
        return jax.lax.cond(plain, lambda: (raw / scale).astype(raw.dtype), divided)

    def is_gradient(self, gradient: Any, shape: Any) -> bool:
        """Return whether something is, as it is, a gradient of that shape; None is any shape."""
        is_real = isinstance(gradient, jax.Array) and jnp.issubdtype(gradient.dtype, jnp.floating)
        return is_real and (shape is None or gradient.shape == shape)

    def trace_context(self) -> tuple[Any, Any]:
        """Return what tells this replica and this trace from others; eager code has its own."""
        return None, get_opaque_trace_state(convention="flax")

    def is_traced(self) -> bool:
        """Return whether a function is traced here, which will run again without this code."""
        return self.is_jit_constant(0.0)

    def is_jit_constant(self, scale: Any) -> bool:
        """Return whether a traced function that reads `scale` here keeps it for all its calls."""
        # Under jit alone does JAX trace what depends on no argument; grad and vmap just compute it.
        return not isinstance(scale, jax.core.Tracer) and isinstance(
            jnp.add(scale, 0), jax.core.Tracer
        )

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return `step`, compiled at its first call."""
        return cast("Callable[..., Any]", jax.jit(step))

    def initialize_from(self, variable: Any, other: Any) -> None:
        """Give a variable that holds nothing but zeros the value of another one."""
        if not jnp.any(variable.value):
            # A copy: a train step donates both buffers, and must not donate one twice.
            variable.assign(jnp.copy(other.value))

    def unshare_memory(self, variable: Any, other: Any) -> None:
        """Give a variable a buffer of its own where it shares that of another one.

        Keras writes averages into weights by handing the array on, and the first step of the next
        `fit` then donates one buffer twice, which is an error.
        """
        if variable.value is other.value:
            variable.assign(jnp.copy(other.value))

    def matmul_to_dtype(self, left: Any, right: Any, dtype: str) -> Any:
        """Return the matrix product in `dtype`, without rounding it to that of the factors.

        The factors stay as they are, so that a GPU multiplies float16 numbers in its tensor cores.
        """
        return jnp.matmul(left, right, preferred_element_type=dtype)

    def has_flash_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        is_causal: bool,  # noqa: ARG002 - it does not matter here
    ) -> bool:
        """Return whether Keras would use flash attention here if it were left to choose."""
        # Only Keras knows, and has no public name for it.
        from keras.src.backend.jax.nn import _can_use_flash_attention

        return bool(_can_use_flash_attention(query, key, value, None))

    def reading(self, model: Any) -> Any:
        """Let the state of a model's optimizer read as it is now: in `fit` it travels outside.

        Without the moments: Keras's own method makes all variables current, which takes as long as
        some steps of a small model.
        """
        now = optimizer_in_fit(model)
        return keras.StatelessScope([(v, x) for v, x in now if not v.shape or "int" in v.dtype])

    def in_dtype(self, value: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
        """Return an array in another dtype, sharded as it is; there is nothing to put back."""
        return jax.device_put(value.astype(dtype), value.sharding), lambda: None

    def is_mixed_dtype_error(self, error: Exception) -> bool:
        """Return whether an error says that operands of different float dtypes met."""
        return isinstance(error, TypeError) and "requires arguments to have the same dtypes" in str(
            error
        )

    def train_step(
        self,
        model: Any,
        optimizers: Sequence[Any],
        step: Callable[..., Any],
        logs_after: Callable[[Any, Any], Any],
        *args: Any,
    ) -> tuple[Any, Sequence[Any]]:
        """Run a pure train step and undo its traces if the optimizer skipped.

        Args:
            model: The model.
            optimizers: Those of ours that it has; the state is that of the compiled one alone.
            step: The step, which takes `state` and `data` and returns logs and state.
            logs_after: Makes of the logs, and whether the step was skipped, those to return.
            *args: The state: trainable, non-trainable, optimizer and metrics variables, as Keras
                passes them; and the batch.

        Returns:
            The logs and the new state.
        """
        if not any(o is model.optimizer for o in optimizers):
            return cast("tuple[Any, Sequence[Any]]", step(*args))
        (_, before, before_optimizer, metrics_before), _ = args
        logs, (trainable, after, optimizer, metrics_after) = step(*args)
        call = running(model)
        with keras.StatelessScope(
            state_mapping=list(zip(model.optimizer.variables, before_optimizer, strict=True))
        ):
            skips = model.optimizer.skips()
        with keras.StatelessScope(
            state_mapping=list(zip(model.optimizer.variables, optimizer, strict=True))
        ):
            skipped = model.optimizer.skips() != skips
        if call and call.losses:
            # As the metrics got it, unscaled and outside of what is differentiated.
            finite = jnp.all(jnp.isfinite(call.losses[-1]))
            optimizer = model.optimizer.with_known_loss(before_optimizer, optimizer, finite)
        after = _choose(skipped, before, after)
        metrics = _choose(skipped, metrics_before, metrics_after)
        with keras.StatelessScope(
            state_mapping=list(zip(model.metrics_variables, metrics, strict=True))
        ):
            logs = logs_after(logs, skipped)
        return logs, (trainable, after, optimizer, metrics)

    def eagerly(self) -> Any:
        """Let all be computed when it is called, each step of a loop and what is compiled too."""
        return jax.disable_jit()

    def trace(self, call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:  # noqa: ARG002 - gradients lack no kernel that the call itself has
        """Trace a call; raise what it raises, and where this device has no kernel for it."""
        traced = []

        def called(*args: Any, **kwargs: Any) -> None:
            def tensors() -> list[Any]:
                return [
                    x for x in keras.tree.flatten(call(*args, **kwargs)) if keras.ops.is_tensor(x)
                ]

            traced.append(jax.make_jaxpr(tensors)())

        compute_output_spec(called, *args, **kwargs)
        for each in traced:
            _refuse_missing_kernels(each.jaxpr, "")


def _refuse_missing_kernels(jaxpr: Any, scope: str) -> None:
    """Raise where an operation has half-precision tensors, and this machine no kernel for them.

    Raises:
        BackendError: There, with the names of the layers around it as its note.
    """
    for eqn in jaxpr.eqns:
        within = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        inner = inner_jaxprs(eqn.params)
        for each in inner:
            _refuse_missing_kernels(each, within)
        dtypes = tuple(str(getattr(var.aval, "dtype", "")) for var in eqn.invars)
        half = next((dtype for dtype in dtypes if dtype in {"float16", "bfloat16"}), None)
        if half and not inner and not _has_kernel(eqn, dtypes):
            error = BackendError(f"JAX has no {half} kernel for {eqn.primitive.name} here.")
            error.add_note(within)
            raise error


# For operations and dtypes of what they take, once JAX was asked. Only lowering tells.
_KERNELS: dict[tuple[str, tuple[str, ...]], bool] = {}


def _has_kernel(eqn: Any, dtypes: tuple[str, ...]) -> bool:
    key = (eqn.primitive.name, dtypes)
    if key not in _KERNELS:
        try:
            given = [
                # A dimension that is not known is another name for a number.
                jax.ShapeDtypeStruct([d if isinstance(d, int) else 2 for d in x.shape], x.dtype)
                for x in (var.aval for var in eqn.invars)
            ]
            jax.jit(lambda *xs: eqn.primitive.bind(*xs, **eqn.params)).lower(*given)
        except NotImplementedError:
            _KERNELS[key] = False
        except Exception:  # noqa: BLE001 - parameters that say a dimension, say: nobody knows
            return True
        else:
            _KERNELS[key] = True
    return _KERNELS[key]


def _can_be_joined(value: Any, dtype: str) -> bool:
    """Return whether a tensor is small, and not spread over devices, each in a way of its own."""
    sharding = getattr(getattr(value, "aval", None), "sharding", None)
    spread = any(getattr(sharding, "spec", None) or ())
    spread |= keras.distribution.distribution() is not None
    return not spread and value.dtype == dtype == "float32" and 0 < value.size <= _SMALL


def _is_narrow(value: Any, dtype: str) -> bool:
    return dtype == "float16" or value.dtype.itemsize < jnp.dtype("float32").itemsize


def _choose(skipped: Any, before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    # What the step passed through untouched, a frozen backbone say, needs no choice and no kernel.
    return [
        new if new is old else jax.tree.map(lambda o, n: jnp.where(skipped, o, n), old, new)
        for old, new in zip(before, after, strict=True)
    ]
