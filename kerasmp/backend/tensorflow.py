"""The TensorFlow backend."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from kerasmp.backend.keras_internals import non_trainable_state
from kerasmp.backend.tensorflow_fused import FusedUpdates
from kerasmp.backend.tensorflow_gradients import Gradients
from kerasmp.backend.tensorflow_replicas import Replicas
from kerasmp.backend.tensorflow_tracing import Tracing
from kerasmp.errors import LossScaleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Stock layers that fail. A graph rejects float16 in a range, and a projection has no gradient in
# bfloat16. A test in tests/conversion fails when one of them starts to work, or another one fails.
_WITHOUT_FLOAT16 = ("CutMix", "RandomElasticTransform", "RandomErasing", "RandomGaussianBlur")
_WITHOUT_FLOAT16_ON_CPU = (
    "AdaptiveAveragePooling3D",
    "AdaptiveMaxPooling3D",
    "AveragePooling3D",
    "MaxPooling3D",
)
_WITHOUT_BFLOAT16 = (
    "AugMix",
    "CutMix",
    "RandAugment",
    "RandomPerspective",
    "RandomRotation",
    "RandomShear",
    "RandomTranslation",
    "RandomZoom",
)

# The messages of graphs, of eager kernels, and of argument conversion for two different dtypes.
_FLOAT = r"(?:float16|bfloat16|float32|float64|half|float|double)"
_MIXED_DTYPES = re.compile(
    rf"has type {_FLOAT} that does not match type {_FLOAT}"
    rf"|was expected to be a {_FLOAT} tensor but is a {_FLOAT} tensor"
    rf"|Tensor conversion requested dtype {_FLOAT} for Tensor with dtype {_FLOAT}"
    rf"|containing a tensor of dtype <dtype: '{_FLOAT}'> to <dtype: '{_FLOAT}'>"
    rf"|have types? \[?{_FLOAT}.* that don't all match"
)


def _run_body(_profile: Any, _call: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    return function.python_function(*args, **kwargs)


class TensorFlow(Gradients, FusedUpdates, Replicas, Tracing):
    """The TensorFlow backend; see `Backend`."""

    # In bfloat16 the gradient of a vector along the last axis, in float16 that of most others.
    SUMS_IN_COMPUTE_DTYPE = True
    MATMUL_FUNCTIONS = tuple(
        (module, name) for name in ("matmul", "einsum", "tensordot") for module in (tf, tf.linalg)
    )
    # A profiled `tf.function` runs its Python body in the profiling context only;
    # `tf.config.run_functions_eagerly` would do so in all threads.
    COMPILED_CALLS = ((type(tf.function(lambda: None)), "__call__", _run_body),)

    def convolution_dtype(self, dtype: str) -> str:
        """Return the dtype to compute a convolution in if its inputs have `dtype`.

        TensorFlow's CPU kernels accumulate float16 in float16 and, without oneDNN, bfloat16 in
        bfloat16. The gradient of a kernel is then off by 10 to 100 times the rounding, and takes
        several times as long as in float32.
        """
        half = dtype in {"float16", "bfloat16"}
        if not half or tf.config.list_logical_devices("GPU"):
            return dtype
        return "float32" if dtype == "float16" or _accumulates_in_bfloat16() else dtype

    def add_bias(self, outputs: Any, bias: Any) -> Any:
        """Add a bias, and sum its gradient in float32.

        The forward sum is stock Keras's: in float32 it would take three passes without XLA.
        """
        if not isinstance(outputs, tf.Tensor):
            return super().add_bias(outputs, bias)
        bias = tf.convert_to_tensor(bias)
        if outputs.dtype not in {tf.float16, tf.bfloat16}:
            return _add(outputs, tf.cast(bias, outputs.dtype))
        if outputs.dtype == tf.float16 and bias.shape[-1] > 1 and _is_along_last(outputs, bias):
            # TensorFlow's gradient kernel for such a vector sums float16 in float32. Keras does not
            # use this kernel for a single number.
            return keras.ops.add(outputs, tf.cast(bias, outputs.dtype))
        return _add_bias(outputs, bias)

    def take_rows(self, table: Any, ids: Any) -> Any:
        """Return the rows of a table, a variable or a tensor, without copying the table.

        Keras reads the whole variable, so that the following update has to copy it.
        """
        if not isinstance(ids, tf.Tensor):  # sparse or ragged ids, which Keras handles
            return super().take_rows(table, ids)
        values = table.value if isinstance(table, keras.Variable) else table
        return tf.gather(values, tf.where(ids < 0, ids + table.shape[0], ids))

    def matmul_to_dtype(self, left: Any, right: Any, dtype: str) -> Any:
        """Return the matrix product in `dtype`, without rounding it to the dtype of the factors.

        The factors are cast first. `tf.matmul(..., output_type=)` turns float16 into float32 only
        under XLA, has no gradient there, and is not faster on a CPU.
        """
        return tf.matmul(tf.cast(left, dtype), tf.cast(right, dtype))

    def layers_without_kernel(self, dtype: str) -> tuple[str, ...]:
        """Return the names of the stock layers whose call or gradient fails in a dtype."""
        on_cpu = not tf.config.get_visible_devices("GPU")
        return {
            "float16": _WITHOUT_FLOAT16 + (_WITHOUT_FLOAT16_ON_CPU if on_cpu else ()),
            "bfloat16": _WITHOUT_BFLOAT16,
        }.get(dtype, ())

    def is_mixed_dtype_error(self, error: Exception) -> bool:
        """Return whether an error says that operands have different float dtypes."""
        kinds = (TypeError, ValueError, tf.errors.InvalidArgumentError)
        return isinstance(error, kinds) and _MIXED_DTYPES.search(str(error)) is not None

    def require_pure_step(self) -> None:
        """Raise, because TensorFlow's variables change in place."""
        raise LossScaleError(
            "stateless_apply is not supported with the TensorFlow backend.",
            received="a call on TensorFlow, whose variables the step would change in place",
            expected="JAX or torch",
            fix="Call optimizer.apply(grads, variables), also inside a tf.function.",
        )

    def peek(self, source: Any, steps: int) -> tuple[Any, Any]:
        """See `Backend.peek`. The batches come back from an iterator of the same type.

        A train function is compiled for the type of its iterator, and takes no other.
        """
        if not isinstance(source, tf.data.Iterator):  # one over several replicas, or its batches
            return (None if hasattr(source, "__next__") else super().peek(source, steps)[0]), source
        batches: list[Any] = []
        try:  # before a batch is taken
            again = tf.data.Dataset.from_generator(
                lambda: iter(batches), output_signature=source.element_spec
            )
        except (TypeError, ValueError):  # a specification that a generator cannot have
            return None, source
        with contextlib.suppress(StopIteration, tf.errors.OutOfRangeError):
            batches.extend(itertools.islice(source, steps))
        return (batches[0] if batches else None), iter(again)

    def train_step(
        self,
        model: Any,
        optimizers: Sequence[Any],
        step: Callable[..., Any],
        logs_after: Callable[[Any, Any], Any],
        data: Any,
    ) -> Any:
        """Run a train step, and undo its side effects if an optimizer skipped it.

        The values read before the step alias the variables' buffers, and the branch that restores
        them runs in skipped steps only.
        """
        if tf.executing_eagerly() and not model.built:
            # Variables that the step itself created could not be restored. A graph is traced again.
            model(keras.utils.unpack_x_y_sample_weight(data)[0], training=False)
        state = [*non_trainable_state(model), *model.metrics_variables]
        guarded = [v for v in state if v.dtype != "string"]
        before = [tf.identity(v.value) for v in guarded]
        skips = [o.skips() for o in optimizers]
        known = {id(v) for v in model.metrics_variables}
        logs = keras.tree.map_structure(_read_now, step(data))
        used = [(o, n) for o, n in zip(optimizers, skips, strict=True) if o.built]
        if not used:  # nothing is trainable
            return logs
        # An optimizer that the first step builds is built in a trace that is discarded.
        skipped = tf.reduce_any(
            [o.skipped_last() if n is None else tf.not_equal(o.skips(), n) for o, n in used]
        )
        late = [m for m in model.metrics if not known.issuperset(id(v) for v in m.variables)]

        def restore() -> None:
            for variable, value in zip(guarded, before, strict=True):
                variable.assign(value)
            for metric in late:
                metric.reset_state()

        tf.cond(skipped, restore, lambda: None)
        return logs_after(logs, skipped)

    @tf.autograph.experimental.do_not_convert  # its conditions are evaluated now, not in a graph
    def initialize_from(self, variable: Any, other: Any) -> None:
        """Assign the value of `other` to a variable that holds only zeros."""
        # Immediately, even while a graph is traced: its next runs would not execute this.
        with tf.init_scope():
            source = other.value if isinstance(other, keras.Variable) else other
            if not source.is_initialized():  # it is created in the same trace
                return
            # A checkpoint that was restored before the build assigns values to variables when they
            # are created. A variable that is created in a trace has no value yet.
            if not variable.value.is_initialized() or not tf.reduce_any(tf.not_equal(variable, 0)):
                variable.assign(source)

    def cast_variable(self, variable: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
        """Return a copy of a variable in another dtype; there is nothing to undo.

        A `tf.Variable` cannot change its dtype.
        """
        strategy = getattr(variable, "distribute_strategy", None)
        scope = tf.device(variable.device) if strategy is None else strategy.scope()
        with tf.init_scope(), scope:
            copy = tf.Variable(
                tf.cast(variable, dtype),
                trainable=variable.trainable,
                name=variable.name.partition(":")[0],
                synchronization=variable.synchronization,
                aggregation=variable.aggregation,
            )
        return copy, lambda: None


@functools.cache
def _accumulates_in_bfloat16() -> bool:
    """Return whether CPU convolutions accumulate bfloat16 in bfloat16, as all but oneDNN's do.

    Which kernels exist depends on the CPU as well, so one is tried, outside of any graph.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        values = tf.reshape(tf.constant([256.0] + [1.0] * 256, "bfloat16"), (1, 257, 1, 1))
        summed = tf.raw_ops.Conv2DBackpropFilter(
            input=values,
            filter_sizes=(1, 1, 1, 1),
            out_backprop=tf.ones_like(values),
            strides=[1] * 4,
            padding="VALID",
        )
        return float(tf.reduce_sum(summed)) != 512.0  # noqa: PLR2004 - the exact sum


@tf.custom_gradient
def _add_bias(outputs: Any, bias: Any) -> Any:
    def gradient(upstream: Any) -> tuple[Any, Any]:
        shape = [1] * (len(outputs.shape) - len(bias.shape)) + bias.shape.as_list()
        axes = [axis for axis, size in enumerate(shape) if size == 1]
        summed = tf.reduce_sum(tf.cast(upstream, "float32"), axes)
        return upstream, tf.cast(tf.reshape(summed, bias.shape), bias.dtype)

    return _add(outputs, tf.cast(bias, outputs.dtype)), gradient


def _add(outputs: Any, bias: Any) -> Any:
    # keras.ops.add has a kernel for a bias, but adds any vector of fitting length to the last axis.
    add = keras.ops.add if _is_along_last(outputs, bias) else tf.add
    return add(outputs, bias)


def _is_along_last(outputs: Any, bias: Any) -> bool:
    return bool(bias.shape.num_elements() == bias.shape[-1] == outputs.shape[-1])


def _read_now(value: Any) -> Any:
    # Reading a metric's variable later would give its restored value.
    is_variable = isinstance(value, (keras.Variable, tf.Variable))
    return tf.convert_to_tensor(value) if is_variable else value
