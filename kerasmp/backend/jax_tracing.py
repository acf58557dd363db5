"""Tracing on JAX, which finds operations that have no half-precision kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import keras
from jax import numpy as jnp

from kerasmp.backend.keras_internals import compute_output_spec
from kerasmp.backend.protocol import Backend
from kerasmp.errors import BackendError

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # older versions of JAX
    from jax.core import get_opaque_trace_state

if TYPE_CHECKING:
    from collections.abc import Callable


class Tracing(Backend):
    """The methods of `Backend` that trace calls, or run them eagerly."""

    def trace(self, call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:  # noqa: ARG002 - if the call has its kernels, its gradients have theirs
        """Trace a call, and raise if it fails or this device has no kernel for it."""
        traced = []

        def called(*args: Any, **kwargs: Any) -> None:
            def tensors() -> list[Any]:
                outputs = keras.tree.flatten(call(*args, **kwargs))
                return [x for x in outputs if keras.ops.is_tensor(x)]

            traced.append(jax.make_jaxpr(tensors)())

        compute_output_spec(called, *args, **kwargs)
        for each in traced:
            _refuse_missing_kernels(each.jaxpr, "")

    def eager_scope(self) -> Any:
        """Return a scope in which loops and compiled functions run eagerly, too."""
        return jax.disable_jit()

    def is_traced(self) -> bool:
        """Return whether this code runs in a trace, so that later calls run without it."""
        return self.is_jit_constant(0.0)

    def is_jit_constant(self, value: Any) -> bool:
        """Return whether a function traced here would keep `value` as a constant for all calls."""
        # Only under jit does JAX trace an operation on constants; grad and vmap just compute it.
        tracer = jax.core.Tracer
        return not isinstance(value, tracer) and isinstance(jnp.add(value, 0), tracer)

    def trace_context(self) -> tuple[Any, Any]:
        """Return keys that identify the current replica and the current trace, or eager code."""
        return None, get_opaque_trace_state(convention="flax")


def _refuse_missing_kernels(jaxpr: Any, scope: str) -> None:
    """Raise if an operation uses half precision and this device has no kernel for it.

    Raises:
        BackendError: With the names of the layers around the operation as its note.
    """
    for eqn in jaxpr.eqns:
        within = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        inner = _inner_jaxprs(eqn.params)
        for each in inner:
            _refuse_missing_kernels(each, within)
        dtypes = tuple(str(getattr(var.aval, "dtype", "")) for var in eqn.invars)
        half = next((dtype for dtype in dtypes if dtype in {"float16", "bfloat16"}), None)
        if half and not inner and not _has_kernel(eqn, dtypes):
            error = BackendError(
                f"JAX has no {half} kernel for {eqn.primitive.name} on this device."
            )
            error.add_note(within)
            raise error


def _inner_jaxprs(params: Any) -> list[Any]:
    """Return the jaxprs among the parameters of an operation, such as the body of a loop."""
    values = [each for v in params.values() for each in (v if isinstance(v, tuple | list) else [v])]
    jaxprs = [getattr(each, "jaxpr", each) for each in values]
    return [each for each in jaxprs if hasattr(each, "eqns")]


# By operation and the dtypes of its inputs: what JAX said. Only lowering can find out.
_KERNELS: dict[tuple[str, tuple[str, ...]], bool] = {}


def _has_kernel(eqn: Any, dtypes: tuple[str, ...]) -> bool:
    key = (eqn.primitive.name, dtypes)
    if key not in _KERNELS:
        try:
            inputs = [
                # An unknown dimension is a symbol.
                jax.ShapeDtypeStruct([d if isinstance(d, int) else 2 for d in x.shape], x.dtype)
                for x in (var.aval for var in eqn.invars)
            ]
            jax.jit(lambda *xs: eqn.primitive.bind(*xs, **eqn.params)).lower(*inputs)
        except NotImplementedError:
            _KERNELS[key] = False
        except Exception:  # noqa: BLE001 - such as parameters that name an unknown dimension
            return True
        else:
            _KERNELS[key] = True
    return _KERNELS[key]
