"""Tracing on TensorFlow, which finds operations that have no half-precision kernel."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from tensorflow.python.framework import kernels, op_callbacks

from kerasmp.backend.keras_internals import compute_output_spec
from kerasmp.backend.protocol import Backend
from kerasmp.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The dtypes that many kernels lack, by TensorFlow's numbers.
_HALVES = {dtype.as_datatype_enum: dtype.name for dtype in (tf.float16, tf.bfloat16)}


class Tracing(Backend):
    """The methods of `Backend` that trace calls."""

    def trace(self, call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:
        """Trace a call, and raise if it fails or this device has no kernel for it."""

        def called(*args: Any, **kwargs: Any) -> Any:
            # Added inside the graph: in eager code, the callback would be active in all threads.
            op_callbacks.add_op_callback(_refuse_missing_kernel)
            try:
                return _with_gradients(call, args, kwargs) if backwards else call(*args, **kwargs)
            finally:
                op_callbacks.remove_op_callback(_refuse_missing_kernel)

        compute_output_spec(called, *args, **kwargs)

    @contextlib.contextmanager
    def probe_scope(self) -> Iterator[None]:
        """Return a scope without TensorFlow's warnings that a function is traced often.

        Keras compiles some operations, such as a convolution, for each shape and dtype.
        """
        logger = tf.get_logger()
        level = logger.level
        logger.setLevel("ERROR")
        try:
            yield
        finally:
            logger.setLevel(level)

    def is_traced(self) -> bool:
        """Return whether a graph is being built."""
        return not tf.executing_eagerly()


def _with_gradients(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return the outputs of a call after tracing their gradients by its inputs and weights."""
    inputs = _float_tensors((args, kwargs))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = call(*args, **kwargs)
    tape.gradient(_float_tensors(outputs), [*inputs, *tape.watched_variables()])
    return outputs


def _float_tensors(values: Any) -> list[Any]:
    """Return the dense float tensors in a structure."""
    tensors = [value for value in keras.tree.flatten(values) if isinstance(value, tf.Tensor)]
    return [tensor for tensor in tensors if tensor.dtype.is_floating]


def _refuse_missing_kernel(  # noqa: PLR0913, PLR0917 - the arguments that TensorFlow passes
    op_type: str,
    inputs: Any,  # noqa: ARG001 - as above
    attrs: Any,
    outputs: Any,  # noqa: ARG001
    op_name: str | None = None,
    graph: Any = None,
) -> None:
    """Raise if an operation uses half precision and this device has no kernel for it.

    Raises:
        BackendError: With the name of the operation, scopes included, as its note.
    """
    if graph is None:  # an eager operation, which raises by itself
        return
    types = {
        name: set(value.list.type) | ({value.type} if value.type else set())
        for name, value in zip(attrs[::2], attrs[1::2], strict=True)
    }
    halves = [_HALVES[each] for some in types.values() for each in some if each in _HALVES]
    if not halves:
        return
    known = _kernels(op_type)
    if known and not any(
        all(types.get(name, set()) <= allowed for name, allowed in kernel) for kernel in known
    ):
        error = BackendError(f"TensorFlow has no {halves[0]} kernel for {op_type} on this device.")
        error.add_note(op_name or op_type)
        raise error


@functools.cache
def _kernels(op_type: str) -> list[list[tuple[str, set[int]]]]:
    """Return the types that each kernel for this machine's devices allows for its attributes."""
    # If a GPU has no kernel, TensorFlow uses the one for the CPU.
    devices = {device.device_type for device in tf.config.get_visible_devices()}
    return [
        [(each.name, set(each.allowed_values.list.type)) for each in kernel.constraint]
        for kernel in kernels.get_registered_kernels_for_op(op_type).kernel
        if kernel.device_type in devices
    ]
