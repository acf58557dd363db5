"""What only TensorFlow needs: sparse gradients, and replicas that must agree before they branch."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import re
import weakref
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from tensorflow.python.framework import kernels, op_callbacks
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from kerasmp.backend.keras_internals import compute_output_spec, non_trainable_state
from kerasmp.backend.protocol import Backend, accumulation_dtype, in_parts
from kerasmp.errors import BackendError, LossScaleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kerasmp.backend.protocol import Weight

# So few tensors are checked in no more time than a branch takes.
FEW = 8

# The dtypes that many kernels lack, by TensorFlow's numbers.
_HALVES = {kind.as_datatype_enum: kind.name for kind in (tf.float16, tf.bfloat16)}

# Stock layers that fail. A graph refuses a range of float16, and a projection has no gradient in
# bfloat16; tests/conversion tells when one of them comes to work, or another one to fail.
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

# What the graph, eager kernels, and the conversion of arguments say of two dtypes that do not fit.
_FLOAT = r"(?:float16|bfloat16|float32|float64|half|float|double)"
MIXED_DTYPES = re.compile(
    rf"has type {_FLOAT} that does not match type {_FLOAT}"
    rf"|was expected to be a {_FLOAT} tensor but is a {_FLOAT} tensor"
    rf"|Tensor conversion requested dtype {_FLOAT} for Tensor with dtype {_FLOAT}"
    rf"|containing a tensor of dtype <dtype: '{_FLOAT}'> to <dtype: '{_FLOAT}'>"
    rf"|have types? \[?{_FLOAT}.* that don't all match"
)


@functools.cache
def _adds_up_narrowly() -> bool:
    """Return whether convolutions on the CPU add bfloat16 up in bfloat16, as all but oneDNN's do.

    Which ones there are hangs on the CPU, too: one is asked, before and outside of any graph.
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
        return float(tf.reduce_sum(summed)) != 512.0  # noqa: PLR2004 - the sum of them


@tf.custom_gradient
def _add_bias(outputs: Any, bias: Any) -> Any:
    def gradient(upstream: Any) -> tuple[Any, Any]:
        shape = [1] * (len(outputs.shape) - len(bias.shape)) + bias.shape.as_list()
        axes = [axis for axis, size in enumerate(shape) if size == 1]
        summed = tf.reduce_sum(tf.cast(upstream, "float32"), axes)
        return upstream, tf.cast(tf.reshape(summed, bias.shape), bias.dtype)

    return _sum(outputs, tf.cast(bias, outputs.dtype)), gradient


def _sum(outputs: Any, bias: Any) -> Any:
    # Keras's has a kernel for it, but adds any vector along the last axis that is as long as it.
    return keras.ops.add(outputs, bias) if _along_last(outputs, bias) else tf.add(outputs, bias)


def _along_last(outputs: Any, bias: Any) -> bool:
    return bool(bias.shape.num_elements() == bias.shape[-1] == outputs.shape[-1])


class TensorFlow(Backend):
    """See `Backend`."""

    HAS_FUSED_UPDATES = True
    # In bfloat16 that of a vector along the last axis, in float16 of nearly any other.
    SUMS_IN_COMPUTE_DTYPE = True
    # Keras's method that sums gradients over replicas; tests/backend tells when it moves.
    REDUCTION = "_all_reduce_sum_gradients"
    PRODUCTS = (
        (tf, "matmul"),
        (tf.linalg, "matmul"),
        (tf, "einsum"),
        (tf.linalg, "einsum"),
        (tf, "tensordot"),
        (tf.linalg, "tensordot"),
    )
    # A user's `tf.function` runs its body where it is watched, and nowhere else: in all threads it
    # would under `tf.config.run_functions_eagerly`.
    COMPILED = ((type(tf.function(lambda: None)), "__call__", lambda *_: _body),)

    def convolution_dtype(self, dtype: str) -> str:
        """Return the dtype in which convolutions compute whose inputs have `dtype`.

        TensorFlow's kernels for the CPU add float16 up in float16, and without oneDNN bfloat16 in
        bfloat16: the gradient of a kernel is then off by 10 to 100 times the rounding, and takes
        several times as long as in float32.
        """
        half = dtype in {"float16", "bfloat16"}
        if not half or tf.config.list_logical_devices("GPU"):
            return dtype
        return "float32" if dtype == "float16" or _adds_up_narrowly() else dtype

    def add_bias(self, outputs: Any, bias: Any) -> Any:
        """Return a sum, for whose gradient the one of the outputs is summed in float32.

        The sum itself is that of stock Keras: without XLA a sum in float32 would take three passes.
        """
        if not isinstance(outputs, tf.Tensor):
            return super().add_bias(outputs, bias)
        bias = tf.convert_to_tensor(bias)
        if outputs.dtype not in {tf.float16, tf.bfloat16}:
            return _sum(outputs, tf.cast(bias, outputs.dtype))
        if outputs.dtype == tf.float16 and bias.shape[-1] > 1 and _along_last(outputs, bias):
            # TensorFlow's own kernel for the gradient of a vector sums float16 in float32. Of a
            # single number Keras does not take it.
            return keras.ops.add(outputs, tf.cast(bias, outputs.dtype))
        return _add_bias(outputs, bias)

    def rows(self, table: Any, ids: Any) -> Any:
        """Return the rows of a table, a variable or a tensor, of which no copy is made.

        Keras reads the whole variable, so that the update which follows has to copy it.
        """
        if not isinstance(ids, tf.Tensor):  # Keras knows sparse and ragged ones
            return super().rows(table, ids)
        values_of = table.value if isinstance(table, keras.Variable) else table
        return tf.gather(values_of, tf.where(ids < 0, ids + table.shape[0], ids))

    def without_kernel(self, dtype: str) -> tuple[str, ...]:
        """Return the names of the stock layers that fail in a dtype, in a call or its gradient."""
        on_cpu = not tf.config.get_visible_devices("GPU")
        return {
            "float16": _WITHOUT_FLOAT16 + (_WITHOUT_FLOAT16_ON_CPU if on_cpu else ()),
            "bfloat16": _WITHOUT_BFLOAT16,
        }.get(dtype, ())

    def dense_values(self, gradient: Any) -> Any:
        """Return the numbers of a gradient; those of `IndexedSlices` without densifying them."""
        return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient

    def is_variable(self, value: Any) -> bool:
        """Return whether an optimizer can update it."""
        return isinstance(value, (keras.Variable, tf.Variable))

    def is_gradient(self, gradient: Any, shape: Any) -> bool:
        """Return whether something is, as it is, a gradient of that shape; None is any shape."""
        if isinstance(gradient, tf.IndexedSlices):
            return bool(gradient.dtype.is_floating)
        is_real = isinstance(gradient, tf.Tensor) and gradient.dtype.is_floating
        return is_real and (shape is None or gradient.shape == shape)

    def static_shape(self, values: Any) -> tuple[int | None, ...] | None:
        """Return the shape of a tensor as far as it is known, or None."""
        return None if values.shape.rank is None else tuple(values.shape)

    def replace_values(self, gradient: Any, values: Any) -> Any:
        """Return `gradient` with other numbers at the same places."""
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return values

    def quotient(self, values: Any, divisor: Any) -> Any:
        """Return a tensor divided by a scalar, in float32, or float64 if it came so."""
        dtype = accumulation_dtype(values)
        values = tf.cast(values, dtype)
        if dtype == "float32" and _by_xla():
            # Which computes a product anew where it is used, but writes a quotient to memory.
            half, rest = _factors(tf.cast(divisor, dtype))
            return values * half * rest
        return values / tf.cast(divisor, dtype)

    def branch_if_cheap(
        self,
        state: dict[str, Any],
        allowed: Callable[[dict[str, Any]], Any],
        quick: Callable[[], Any],
        whole: Callable[[], Any],
    ) -> Any:
        """Return `quick()` where that is allowed, else `whole()`."""
        short = allowed(state)
        return whole() if short is None else tf.cond(short, quick, whole)

    def fits_fused_kernels(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[bool]:  # noqa: ARG002 - any do
        """Return whether each gradient is a dense tensor of at most float32, and there at all."""
        return [isinstance(g, tf.Tensor) and g.dtype != tf.float64 for g in grads]

    def can_split_update(self) -> bool:
        """Return whether Keras may update some variables of a step, and fused kernels others."""
        return not _by_xla()  # where fused updates run in no branch

    def finite_per_tensor(
        self, values: Sequence[Any], dtypes: Sequence[str], scale: Any, *, norm: str | None
    ) -> Any:
        """Return for each tensor whether all of it is finite once it is divided by the scale.

        A sum of squares is inf or NaN if one of its terms is, in one kernel, and for huge finite
        ones too: then, and only then, all numbers are looked at.
        """

        def exactly() -> Any:
            if norm and "float16" not in dtypes:
                return self.finite_norm(values, scale, norm)  # which tells of their numbers, too
            quotients = (
                tf.cast(self.quotient(v, scale), d) for v, d in zip(values, dtypes, strict=True)
            )
            found = tf.stack([tf.reduce_all(tf.math.is_finite(q)) for q in quotients])
            return found & self.finite_norm(values, scale, norm) if norm else found

        wide = {*dtypes} <= {"float32", "float64"}
        by_xla = _by_xla()
        if by_xla and wide and not norm:
            # Which has a quick kernel for products, and a slow one for sums over a whole tensor.
            # What is finite stays so if it is divided by 1 or more.
            return tf.cond(scale >= 1, lambda: _finite_by_product(values, scale), exactly)
        if by_xla or len(values) < FEW or not wide:
            return exactly()
        sums = [
            tf.cast(tf.nn.l2_loss(tf.cast(v, accumulation_dtype(v))), "float32") for v in values
        ]
        # Of halves: a norm would be made of twice that.
        clearly = tf.math.is_finite(2.0 * tf.add_n(sums)) & (scale >= 1)
        return tf.cond(clearly, lambda: tf.ones((len(values),), "bool"), exactly)

    def trace_context(self) -> tuple[Any, Any]:
        """Return what tells this replica and this trace from others; None in eager code."""
        context = tf.distribute.get_replica_context()
        replica = None if context is None else context.replica_id_in_sync_group
        graph = None if tf.executing_eagerly() else weakref.ref(tf.compat.v1.get_default_graph())
        return replica if isinstance(replica, int) else None, graph

    def is_traced(self) -> bool:
        """Return whether a graph is made here."""
        return not tf.executing_eagerly()

    def require_pure_step(self) -> None:
        """Raise where a step cannot be a pure function: always."""
        raise LossScaleError(
            "stateless_apply is not supported with the TensorFlow backend.",
            received="a call on TensorFlow, whose variables the step would change in place",
            expected="JAX or torch",
            fix="Call optimizer.apply(grads, variables), also inside a tf.function.",
        )

    def has_single_replica(self) -> bool:
        """Return whether no strategy spreads this step."""
        return not tf.distribute.has_strategy()

    def require_replica_context(self) -> None:
        """Raise where gradients have no replica.

        Raises:
            BackendError: In a cross-replica context.
        """
        if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
            raise BackendError(
                "apply() has no replica whose gradients it could check.",
                received="a call in cross-replica context",
                expected="a call in a replica context",
                fix="Call it inside the function that you give to strategy.run().",
            )

    def all_reduce(
        self, grads: Sequence[Any], variables: Sequence[Any], losses: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the gradients summed over all replicas, and whether all losses were finite.

        What the sums hold, all replicas see, and so all decide alike: a replica that branched on
        its own gradients would apply what the others skip (MirroredStrategy) or wait for ever in a
        collective (MultiWorkerMirroredStrategy). It also means that what overflows only in the sum
        is seen, and that clipping, which comes later, goes by the gradient of the whole batch. Rows
        of sparse gradients are gathered here and not summed: what overflows only where duplicate
        rows are added, near the largest float32, is not seen.

        Args:
            grads: This replica's gradients, None among them or not.
            variables: The variables that they belong to.
            losses: Those of this replica, or none where they are not known.

        Returns:
            The gradients, and losses: on several replicas one stand-in, NaN if a loss of any of
            them is inf or NaN.
        """
        grads = list(grads)
        if not _several_replicas():
            return grads, losses
        context = tf.distribute.get_replica_context()
        sent = [
            None if g is None else self.replace_values(g, _widened(self.dense_values(g)))
            for g in grads
        ]
        if losses:
            finite = [tf.reduce_all(tf.math.is_finite(loss)) for loss in losses]
            sent.append(tf.cast(tf.logical_not(tf.reduce_all(finite)), "float32"))
        # One call, so that small tensors are packed together.
        summed = iter(
            context.all_reduce(tf.distribute.ReduceOp.SUM, [g for g in sent if g is not None])
        )
        received = [None if g is None else next(summed) for g in sent]
        if losses:
            losses = [tf.where(received.pop() == 0, 0.0, float("nan"))]
        # What is a new value and no gradient, float8's scales say, is averaged.
        share = 1.0 / context.num_replicas_in_sync
        return [
            g * share if g is not None and getattr(v, "overwrite_with_gradient", False) else g
            for g, v in zip(received, variables, strict=True)
        ], losses

    def all_reduce_once(self, optimizers: Sequence[Any]) -> None:
        """Keep optimizers from summing over the replicas once more what a step has summed.

        Keras has no public way: its TensorFlow optimizer sums in a method of its own, after
        clipping. What stands in its place is there for good, so that no step has to change it.
        """
        if not _several_replicas():
            return
        for optimizer in optimizers:
            if not callable(getattr(optimizer, self.REDUCTION, None)):
                raise BackendError(
                    "This Keras sums gradients over replicas in a way that kerasmp does not know.",
                    received=f"Keras {keras.__version__}, optimizer {type(optimizer).__name__}",
                    expected=f"a method `{self.REDUCTION}`",
                    fix="Train on one replica, or with a Keras version that CHANGELOG.md names.",
                )
            # Around Keras's own __setattr__: this is no state.
            object.__setattr__(optimizer, self.REDUCTION, _SummedOnce(optimizer, self.REDUCTION))

    def run_step(
        self,
        step: Any,
        finite: Any,
        update: Callable[[Any, Any], None],
        advance: Callable[[Any, Any, bool], None],
        *,
        fused: bool,
    ) -> None:
        """Update the variables if all gradients are finite, else only move the scale."""
        if fused and _by_xla():
            # A branch of XLA's copies all that it may change.
            update(step, tf.reduce_all(finite))
            _branch(finite, lambda: None, lambda applied: advance(step, finite, applied))
            return
        if not tf.distribute.has_strategy():
            _branch(
                finite, lambda: update(step, None), lambda applied: advance(step, finite, applied)
            )
            return

        def update_summed(step: Any) -> None:
            # In the thread of its replica, where it is called.
            token = _SUMMED.set(_several_replicas())
            try:
                update(step, None)
            finally:
                _SUMMED.reset(token)

        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            _branch(
                finite, lambda: update_summed(step), lambda applied: advance(step, finite, applied)
            )
            return

        def in_cross_replica_context(strategy: Any, finite: Any, steps: Any) -> None:
            first_finite = strategy.experimental_local_results(finite)[0]
            first = strategy.experimental_local_results(steps)[0]

            def update_each_replica() -> None:
                strategy.extended.call_for_each_replica(update_summed, args=(steps,))

            _branch(
                first_finite,
                update_each_replica,
                lambda applied: advance(first, first_finite, applied),
            )

        # A branch whose body merges, as the inner optimizer's does, must itself be cross-replica.
        context = tf.distribute.get_replica_context()
        context.merge_call(in_cross_replica_context, args=(finite, step))

    def sum_of_squares(self, values: Sequence[Any], divisor: Any) -> Any:
        """Return the sum of the squares of all quotients, a float32 scalar."""
        raw = 2.0 * tf.add_n([tf.nn.l2_loss(tf.cast(v, "float32")) for v in values])

        def exactly() -> Any:
            return 2.0 * tf.add_n([tf.nn.l2_loss(self.quotient(v, divisor)) for v in values])

        # Numbers that a scale has made so large that only their squares overflow are divided first.
        return tf.cond(tf.math.is_finite(raw), lambda: raw / divisor / divisor, exactly)

    def adam(  # noqa: PLR0913, PLR0917 - what Adam is made of
        self,
        weights: Sequence[Weight],
        divisor: Any,
        alpha: Any,
        betas: tuple[float, float],
        epsilon: float,
        applied: Any,
    ) -> None:
        """Update variables and their moments as `keras.optimizers.Adam` does."""
        if applied is None:
            done: list[Any] = []
            for some in _parts(weights):
                shrunk = _shrink(some, done)
                # Or a graph might have the quotients of all variables at a time.
                with tf.control_dependencies([*done, *shrunk]):
                    gradients = [self.quotient(w.gradient, divisor) for w in some]
                done = [
                    _adam(w, gradient, alpha, betas, epsilon)
                    for w, gradient in zip(some, gradients, strict=True)
                ]
            return
        for weight in weights:
            variable, m, v = (each.value for each in (weight.variable, *weight.moments))
            gradient = self.quotient(weight.gradient, divisor)
            new_m = _assign_if(applied, m, m + (gradient - m) * (1 - betas[0]))
            new_v = _assign_if(applied, v, v + (tf.square(gradient) - v) * (1 - betas[1]))
            step = new_m * alpha / (tf.sqrt(new_v) + epsilon)
            _assign_if(applied, variable, _shrunk(variable, weight.decay) - step)

    def sgd(
        self,
        weights: Sequence[Weight],
        rate: Any,
        momentum: float,
        applied: Any,
        *,
        nesterov: bool,
    ) -> None:
        """Update variables as `keras.optimizers.SGD` does."""
        if applied is None:
            done: list[Any] = []
            for some in _parts(weights):
                _shrink(some, done)
                done = [_sgd(w, rate, momentum, nesterov=nesterov) for w in some]
            return
        for weight in weights:
            variable, gradient = weight.variable.value, tf.cast(weight.gradient, "float32")
            step = gradient * -rate
            if weight.moments:
                moment = weight.moments[0].value
                moved = _assign_if(applied, moment, moment * momentum + step)
                step = moved * momentum + step if nesterov else moved
            _assign_if(applied, variable, _shrunk(variable, weight.decay) + step)

    @tf.autograph.experimental.do_not_convert  # its conditions are about now, not about the graph
    def initialize_from(self, variable: Any, other: Any) -> None:
        """Give a variable that holds nothing but zeros the value of another one."""
        # Now, also while a graph is traced, which would run without this the next time.
        with tf.init_scope():
            source = other.value if isinstance(other, keras.Variable) else other
            if not source.is_initialized():  # the same trace is just making it
                return
            # A checkpoint that was restored before the build gives variables their values as they
            # are made. While a trace makes one, it has none.
            if not variable.value.is_initialized() or not tf.reduce_any(tf.not_equal(variable, 0)):
                variable.assign(source)

    def matmul_to_dtype(self, left: Any, right: Any, dtype: str) -> Any:
        """Return the matrix product in `dtype`, without rounding it to that of the factors.

        The factors are cast first. `tf.matmul(..., output_type=)` takes float16 and gives float32
        under XLA alone, and has no gradient then; on a CPU it is no faster.
        """
        return tf.matmul(tf.cast(left, dtype), tf.cast(right, dtype))

    def in_dtype(self, variable: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
        """Return a variable in another dtype, otherwise alike; there is nothing to put back.

        A variable of TensorFlow keeps the dtype that it was made in.
        """
        strategy = getattr(variable, "distribute_strategy", None)
        where = tf.device(variable.device) if strategy is None else strategy.scope()
        with tf.init_scope(), where:
            alike = tf.Variable(
                tf.cast(variable, dtype),
                trainable=variable.trainable,
                name=variable.name.partition(":")[0],
                synchronization=variable.synchronization,
                aggregation=variable.aggregation,
            )
        return alike, lambda: None

    def is_mixed_dtype_error(self, error: Exception) -> bool:
        """Return whether an error says that operands of different float dtypes met."""
        kinds = (TypeError, ValueError, tf.errors.InvalidArgumentError)
        return isinstance(error, kinds) and MIXED_DTYPES.search(str(error)) is not None

    def train_step(
        self,
        model: Any,
        optimizers: Sequence[Any],
        step: Callable[..., Any],
        logs_after: Callable[[Any, Any], Any],
        data: Any,
    ) -> Any:
        """Run a train step and undo its traces if an optimizer skipped.

        Reads before the step alias the variables' buffers, and the branch that puts values back
        runs in skipped steps only.

        Args:
            model: The model.
            optimizers: Those of ours that the step may use.
            step: The step, which takes `data` and returns logs.
            logs_after: Makes of the logs, and whether the step was skipped, those to return.
            data: The batch.
        """
        if tf.executing_eagerly() and not model.built:
            # What the step itself would make could not be put back; a graph is traced again.
            model(keras.utils.unpack_x_y_sample_weight(data)[0], training=False)
        guarded = [
            v
            for v in (*non_trainable_state(model), *model.metrics_variables)
            if v.dtype != "string"
        ]
        before = [tf.identity(v.value) for v in guarded]
        skips = [o.skips() for o in optimizers]
        known = {id(v) for v in model.metrics_variables}
        logs = keras.tree.map_structure(_read_now, step(data))
        used = [(o, n) for o, n in zip(optimizers, skips, strict=True) if o.built]
        if not used:  # nothing is trainable
            return logs
        # An optimizer without state before its first step is built in a trace that is not kept.
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

    def trace(self, call: Callable[..., Any], args: Any, kwargs: Any, *, backwards: bool) -> None:
        """Trace a call; raise what it raises, and where this device has no kernel for it."""

        def called(*args: Any, **kwargs: Any) -> Any:
            # Here, in a graph: where TensorFlow is eager, a callback would be known to all threads.
            op_callbacks.add_op_callback(_refuse_missing_kernel)
            try:
                return _with_gradients(call, args, kwargs) if backwards else call(*args, **kwargs)
            finally:
                op_callbacks.remove_op_callback(_refuse_missing_kernel)

        compute_output_spec(called, *args, **kwargs)

    def eagerly(self) -> Any:
        """Let all be computed when it is called; all is, but for `COMPILED`."""
        return contextlib.nullcontext()


def _body(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function.python_function(*args, **kwargs)


def _with_gradients(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what a call returns, after gradients of it by what it is given and by weights."""
    given = _floats((args, kwargs))
    with tf.GradientTape() as tape:
        tape.watch(given)
        outputs = call(*args, **kwargs)
    tape.gradient(_floats(outputs), [*given, *tape.watched_variables()])
    return outputs


def _floats(values: Any) -> list[Any]:
    """Return the dense float tensors among values."""
    tensors = [value for value in keras.tree.flatten(values) if isinstance(value, tf.Tensor)]
    return [tensor for tensor in tensors if tensor.dtype.is_floating]


def _refuse_missing_kernel(  # noqa: PLR0913, PLR0917 - what TensorFlow calls it with
    op_type: str,
    inputs: Any,  # noqa: ARG001 - see above
    attrs: Any,
    outputs: Any,  # noqa: ARG001 - see above
    op_name: str | None = None,
    graph: Any = None,
) -> None:
    """Raise where an operation has half-precision tensors, and no kernel of this machine for them.

    Raises:
        BackendError: There, with the name of the operation, scopes and all, as its note.
    """
    if graph is None:  # what runs needs no telling
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
        error = BackendError(f"TensorFlow has no {halves[0]} kernel for {op_type} here.")
        error.add_note(op_name or op_type)
        raise error


@functools.cache
def _kernels(op_type: str) -> list[list[tuple[str, set[int]]]]:
    """Return for each kernel of this machine's devices which types its attributes may have."""
    # Where a GPU has none, TensorFlow takes the one for the CPU.
    devices = {device.device_type for device in tf.config.get_visible_devices()}
    return [
        [(each.name, set(each.allowed_values.list.type)) for each in kernel.constraint]
        for kernel in kernels.get_registered_kernels_for_op(op_type).kernel
        if kernel.device_type in devices
    ]


def _read_now(value: Any) -> Any:
    # A metric's variable would be read after it is put back.
    is_variable = isinstance(value, (keras.Variable, tf.Variable))
    return tf.convert_to_tensor(value) if is_variable else value


def _widened(values: Any) -> Any:
    return values if values.dtype == tf.float64 else tf.cast(values, "float32")


def _several_replicas() -> bool:
    return bool(tf.distribute.get_strategy().num_replicas_in_sync > 1)


_SUMMED: contextvars.ContextVar[bool] = contextvars.ContextVar("_SUMMED", default=False)


class _SummedOnce:
    """Stands for the method of an optimizer that sums gradients over replicas.

    Args:
        optimizer: The optimizer.
        name: The method's name in its class.
    """

    def __init__(self, optimizer: Any, name: str) -> None:
        self._optimizer = optimizer
        self._name = name

    def __call__(self, grads_and_vars: Any) -> Any:
        if _SUMMED.get():
            return grads_and_vars
        return getattr(type(self._optimizer), self._name)(self._optimizer, grads_and_vars)


def _by_xla() -> bool:
    """Return whether what is traced here will be compiled by XLA."""
    # Publicly a function does not know how it was asked to be compiled.
    graph = tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else None
    return graph is not None and GraphOrParentsInXlaContext(graph)


def _finite_by_product(values: Sequence[Any], scale: Any) -> Any:
    """Return which tensors have no inf and no NaN: zero times these is NaN."""
    # That it is zero XLA must not know.
    zero = tf.minimum(scale, 1.0) * 0.0
    found = []
    for each in values:
        columns = (each.shape[-1] if each.shape.rank else 1) or 1  # none, or not known
        rows = tf.reshape(tf.cast(each, accumulation_dtype(each)), (-1, columns))
        zeros = tf.fill((columns, 1), tf.cast(zero, rows.dtype))
        found.append(tf.reduce_all(tf.equal(tf.matmul(rows, zeros), 0)))
    return tf.stack(found)


def _factors(divisor: Any) -> tuple[Any, Any]:
    """Return two factors whose product is 1 / divisor: one might be flushed to zero.

    Both are exact for a power of two.
    """
    bits = tf.bitcast(divisor, tf.int32)
    exponent = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 23), 255) - 127
    half = tf.bitcast(tf.bitwise.left_shift(127 - exponent // 2, 23), tf.float32)
    return half, 1.0 / (divisor * half)


def _adam(
    weight: Weight, gradient: Any, alpha: Any, betas: tuple[float, float], epsilon: float
) -> Any:
    variable, m, v = (each.value for each in (weight.variable, *weight.moments))
    return tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=m.handle,
        v=v.handle,
        beta1_power=0.0,  # `alpha` is corrected already
        beta2_power=0.0,
        lr=alpha,
        beta1=betas[0],
        beta2=betas[1],
        epsilon=epsilon,
        grad=gradient,
    )


def _sgd(weight: Weight, rate: Any, momentum: float, *, nesterov: bool) -> Any:
    variable, gradient = weight.variable.value, tf.cast(weight.gradient, "float32")
    if not weight.moments:
        return tf.raw_ops.ResourceApplyGradientDescent(
            var=variable.handle, alpha=rate, delta=gradient
        )
    return tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=weight.moments[0].value.handle,
        lr=rate,
        grad=gradient,
        momentum=momentum,
        use_nesterov=nesterov,
    )


def _parts(weights: Sequence[Weight]) -> Iterator[list[Any]]:
    sizes = [math.prod(weight.variable.shape) for weight in weights]
    return in_parts(weights, sizes, max(sizes))


def _shrink(weights: Sequence[Weight], done: Sequence[Any]) -> list[Any]:
    """Let variables decay once `done` is, and return what a graph has to wait for."""
    shrunk = []
    for weight in weights:
        if weight.decay is not None:
            variable = weight.variable.value
            with tf.control_dependencies(done):
                less = variable * weight.decay
            shrunk.append(variable.assign_sub(less, read_value=False))
    return [each for each in shrunk if each is not None]


def _shrunk(variable: Any, decay: Any) -> Any:
    return variable if decay is None else variable - variable * decay


def _assign_if(applied: Any, variable: Any, value: Any) -> Any:
    value = tf.where(applied, value, variable)
    variable.assign(value, read_value=False)
    return value


def _branch(finite: Any, update: Callable[[], None], advance: Callable[[bool], None]) -> None:
    def applied() -> None:
        update()
        advance(True)

    tf.cond(tf.reduce_all(finite), applied, lambda: advance(False))
