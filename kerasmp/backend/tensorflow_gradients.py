"""Gradients on TensorFlow: sparse values, division by the scale, and checks for inf and NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from kerasmp.backend.keras_internals import copy_mask
from kerasmp.backend.protocol import Backend
from kerasmp.backend.tensors import accumulation_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Checking fewer tensors than this takes no longer than a branch does.
_FEW = 8


def compiled_by_xla() -> bool:
    """Return whether XLA will compile what is traced here."""
    # Publicly, a function cannot read whether it was created with jit_compile=True.
    graph = tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else None
    return graph is not None and GraphOrParentsInXlaContext(graph)


class Gradients(Backend):
    """The methods of `Backend` that read gradients."""

    def vjp(
        self, function: Callable[..., Sequence[Any]], tensors: Sequence[Any]
    ) -> tuple[Sequence[Any], Callable[[Sequence[Any]], list[Any]]]:
        """Call a function eagerly, and return its outputs and its vector-Jacobian product."""
        # Other tensors: Keras attaches logits to probabilities, and a loss would use these instead.
        leaves = [copy_mask(each, tf.identity(each)) for each in tensors]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(leaves)
            outputs = function(*leaves)

        def product(gradients: Sequence[Any]) -> list[Any]:
            found: list[Any] = tape.gradient(outputs, leaves, output_gradients=gradients)
            return found

        return outputs, product

    def tap(self, tensor: Any, callback: Callable[[Any, Any], None]) -> Any:
        """Return a tensor whose gradient is reported while it is computed eagerly."""

        @tf.custom_gradient
        def identity(x: Any) -> Any:
            def gradient(upstream: Any) -> Any:
                callback(x, upstream)
                return upstream

            return tf.identity(x), gradient

        return identity(tensor)

    def dense_values(self, gradient: Any) -> Any:
        """Return the values of a gradient as a tensor; `IndexedSlices` are not made dense."""
        return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient

    def to_dense(self, gradient: Any) -> Any:
        """Return a gradient as a tensor of the shape of its variable."""
        return tf.convert_to_tensor(gradient)

    def replace_values(self, gradient: Any, values: Any) -> Any:
        """Return a gradient like `gradient` with other values."""
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return values

    def divide(self, values: Any, divisor: Any) -> Any:
        """Divide a tensor by a scalar in float32, or in float64 if the tensor is float64."""
        dtype = accumulation_dtype(values)
        values = tf.cast(values, dtype)
        if dtype == "float32" and compiled_by_xla():
            # XLA writes a quotient to memory, but recomputes a product wherever it is used.
            first, second = _reciprocal_factors(tf.cast(divisor, dtype))
            return values * first * second
        return values / tf.cast(divisor, dtype)

    def is_variable(self, value: Any) -> bool:
        """Return whether an optimizer can update `value`."""
        return isinstance(value, (keras.Variable, tf.Variable))

    def is_gradient(self, gradient: Any, shape: Any) -> bool:
        """Return whether `gradient` is a float tensor of `shape`, or of any shape for None."""
        if isinstance(gradient, tf.IndexedSlices):
            return bool(gradient.dtype.is_floating)
        is_float = isinstance(gradient, tf.Tensor) and gradient.dtype.is_floating
        return is_float and (shape is None or gradient.shape == shape)

    def static_shape(self, values: Any) -> tuple[int | None, ...] | None:
        """Return the static shape of a tensor, or None if its rank is unknown."""
        return None if values.shape.rank is None else tuple(values.shape)

    def branch_if_cheap(
        self,
        state: dict[str, Any],
        allowed: Callable[[dict[str, Any]], Any],
        quick: Callable[[], Any],
        whole: Callable[[], Any],
    ) -> Any:
        """Return `quick()` if it is allowed, else `whole()`."""
        is_allowed = allowed(state)
        return whole() if is_allowed is None else tf.cond(is_allowed, quick, whole)

    def finite_per_tensor(
        self, values: Sequence[Any], dtypes: Sequence[str], scale: Any, *, norm: str | None
    ) -> Any:
        """Return for each tensor whether all its values are finite after division by the scale.

        A sum of squares, which takes one kernel, is inf or NaN if one of its terms is. It also
        overflows for huge finite values; then, and only then, every value is checked.
        """

        def check_values() -> Any:
            if norm and "float16" not in dtypes:
                # A finite norm implies finite values.
                return self.finite_norm_per_tensor(values, scale, norm)
            quotients = (
                tf.cast(self.divide(v, scale), d) for v, d in zip(values, dtypes, strict=True)
            )
            found = tf.stack([tf.reduce_all(tf.math.is_finite(q)) for q in quotients])
            return found & self.finite_norm_per_tensor(values, scale, norm) if norm else found

        wide = {*dtypes} <= {"float32", "float64"}
        by_xla = compiled_by_xla()
        if by_xla and wide and not norm:
            # XLA has a fast kernel for products, and a slow one for sums over a whole tensor.
            # Finite values stay finite when they are divided by 1 or more.
            return tf.cond(scale >= 1, lambda: _finite_by_product(values, scale), check_values)
        if by_xla or len(values) < _FEW or not wide:
            return check_values()
        sums = [
            tf.cast(tf.nn.l2_loss(tf.cast(v, accumulation_dtype(v))), "float32") for v in values
        ]
        # l2_loss is half the sum of squares, and the norm is made of the whole sum.
        all_finite = tf.math.is_finite(2.0 * tf.add_n(sums)) & (scale >= 1)
        return tf.cond(all_finite, lambda: tf.ones((len(values),), "bool"), check_values)

    def sum_of_squares(self, values: Sequence[Any], divisor: Any) -> Any:
        """Return the sum of the squares of all quotients, a float32 scalar."""
        raw = 2.0 * tf.add_n([tf.nn.l2_loss(tf.cast(v, "float32")) for v in values])

        def divide_first() -> Any:
            return 2.0 * tf.add_n([tf.nn.l2_loss(self.divide(v, divisor)) for v in values])

        # The scale can make values so large that their squares overflow.
        return tf.cond(tf.math.is_finite(raw), lambda: raw / divisor / divisor, divide_first)


def _finite_by_product(values: Sequence[Any], scale: Any) -> Any:
    """Return which tensors are finite: zero times inf or NaN is NaN."""
    # Computed from the scale, so that XLA does not know that it is zero.
    zero = tf.minimum(scale, 1.0) * 0.0
    found = []
    for value in values:
        # The last axis may be absent, of unknown length, or empty.
        columns = (value.shape[-1] if value.shape.rank else 1) or 1
        rows = tf.reshape(tf.cast(value, accumulation_dtype(value)), (-1, columns))
        zeros = tf.fill((columns, 1), tf.cast(zero, rows.dtype))
        found.append(tf.reduce_all(tf.equal(tf.matmul(rows, zeros), 0)))
    return tf.stack(found)


def _reciprocal_factors(divisor: Any) -> tuple[Any, Any]:
    """Return two factors whose product is 1 / divisor; a single one could be flushed to zero.

    Both are exact for a power of two.
    """
    bits = tf.bitcast(divisor, tf.int32)
    exponent = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 23), 255) - 127
    half = tf.bitcast(tf.bitwise.left_shift(127 - exponent // 2, 23), tf.float32)
    return half, 1.0 / (divisor * half)
