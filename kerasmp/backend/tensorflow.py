"""What only TensorFlow needs: sparse gradients, and replicas that must agree before they branch."""

from __future__ import annotations

import contextlib
import re
import weakref
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from kerasmp.backend.keras_private import states_of
from kerasmp.backend.nested import optimizers_in
from kerasmp.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# The loss that scale_loss sees can be read when the gradients are applied.
LOSS_MEETS_APPLY = True

# Many small sums cost more here than a branch around them.
BRANCHES = True

# So few tensors are checked in no more time than a branch takes.
FEW = 8

# The gradient of what is broadcast or used in each step of a loop is summed in float32.
NARROW_SUMS = False

# Keras's method that sums gradients over replicas; tests/backend tells when it moves.
REDUCTION = "_all_reduce_sum_gradients"


# What the graph, eager kernels, and the conversion of arguments say of two dtypes that do not fit.
_FLOAT = r"(?:float16|bfloat16|float32|float64|half|float|double)"
MIXED_DTYPES = re.compile(
    rf"has type {_FLOAT} that does not match type {_FLOAT}"
    rf"|was expected to be a {_FLOAT} tensor but is a {_FLOAT} tensor"
    rf"|Tensor conversion requested dtype {_FLOAT} for Tensor with dtype {_FLOAT}"
    rf"|containing a tensor of dtype <dtype: '{_FLOAT}'> to <dtype: '{_FLOAT}'>"
    rf"|have types? \[?{_FLOAT}.* that don't all match"
)


def convolution_dtype(dtype: str) -> str:
    """Return the dtype in which convolutions compute whose inputs have `dtype`.

    TensorFlow's kernels for the CPU add float16 up in float16: the gradient of a kernel is then off
    by 10 to 70 times the rounding, and takes several times as long as in float32.
    """
    on_cpu = dtype == "float16" and not tf.config.list_logical_devices("GPU")
    return "float32" if on_cpu else dtype


def recurrence_dtype(dtype: str) -> str:
    """Return the dtype for a whole LSTM or GRU that computes in `dtype`."""
    return dtype


def dense_values(gradient: Any) -> Any:
    """Return the numbers of a gradient; those of `IndexedSlices` without densifying them."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def with_values(gradient: Any, values: Any) -> Any:
    """Return `gradient` with other numbers at the same places."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values


def checked(values: Sequence[Any], exactly: Callable[[], Any]) -> Any:
    """Return which values are finite, as `exactly` does, in half as many kernels if all are.

    A sum of squares is inf or NaN if one of its terms is, and for huge finite ones too: then, and
    only then, `exactly` tells.

    Args:
        values: Tensors of any shape.
        exactly: Returns a bool vector, for each tensor whether all of it is finite.
    """
    if len(values) < FEW:
        return exactly()
    sums = [tf.nn.l2_loss(v if v.dtype == tf.float64 else tf.cast(v, "float32")) for v in values]
    clearly = tf.reduce_all(tf.math.is_finite(tf.stack([tf.cast(s, "float32") for s in sums])))
    return tf.cond(clearly, lambda: tf.ones((len(values),), "bool"), exactly)


def place() -> tuple[Any, Any]:
    """Return what tells this replica and this trace from others; a trace is None in eager code."""
    context = tf.distribute.get_replica_context()
    replica = None if context is None else context.replica_id_in_sync_group
    graph = None if tf.executing_eagerly() else weakref.ref(tf.compat.v1.get_default_graph())
    return replica if isinstance(replica, int) else None, graph


def bakes_in(scale: Any) -> bool:  # noqa: ARG001 - one signature for all backends
    """Return whether a traced function that reads `scale` here keeps this value for all calls.

    A graph reads variables anew in each call. Before `build` there is none, but TensorFlow traces a
    function that makes variables, as the first `apply` does, once more for its second call.
    """
    return False


def refuse_no_replica() -> None:
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


def agreed(
    grads: Sequence[Any], variables: Sequence[Any], losses: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Return the gradients summed over all replicas, and what tells whether all losses were finite.

    What the sums hold, all replicas see, and so all decide alike: a replica that branched on its
    own gradients would apply what the others skip (MirroredStrategy) or wait for ever in a
    collective (MultiWorkerMirroredStrategy). It also means that what overflows only in the sum is
    seen, and that clipping, which comes later, goes by the gradient of the whole batch. Rows of
    sparse gradients are gathered here and not summed: what overflows only where duplicate rows are
    added, near the largest float32, is not seen.

    Args:
        grads: This replica's gradients, None among them or not.
        variables: The variables that they belong to.
        losses: Those of this replica, or none where they are not known.

    Returns:
        The gradients, and losses: on several replicas one stand-in, NaN if a loss of any of them is
        inf or NaN.
    """
    grads = list(grads)
    if not _several_replicas():
        return grads, losses
    context = tf.distribute.get_replica_context()
    sent = [None if g is None else with_values(g, _widened(dense_values(g))) for g in grads]
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


def _widened(values: Any) -> Any:
    return values if values.dtype == tf.float64 else tf.cast(values, "float32")


def _several_replicas() -> bool:
    return bool(tf.distribute.get_strategy().num_replicas_in_sync > 1)


def run_step(
    finite: Any,
    step: Any,
    update: Callable[[Any], None],
    advance: Callable[[Any, Any, bool], None],
    inner_optimizer: Any,
) -> None:
    """Update the variables if all gradients are finite, else only move the scale.

    Args:
        finite: Bool vector, whether each gradient is finite; equal in all replicas.
        step: What `update` and `advance` are given, in each replica its own.
        update: Called with `step` in each replica, if all is finite.
        advance: Called once with `step`, `finite` and whether the step was applied.
        inner_optimizer: The optimizer that `update` calls.
    """
    if not tf.distribute.has_strategy():
        _branch(finite, lambda: update(step), lambda applied: advance(step, finite, applied))
        return
    reduced = optimizers_in(inner_optimizer) if _several_replicas() else []
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        with _not_reducing(reduced):
            _branch(finite, lambda: update(step), lambda applied: advance(step, finite, applied))
        return

    def in_cross_replica_context(strategy: Any, finite: Any, steps: Any) -> None:
        first_finite = strategy.experimental_local_results(finite)[0]
        first = strategy.experimental_local_results(steps)[0]

        def update_each_replica() -> None:
            strategy.extended.call_for_each_replica(update, args=(steps,))

        with _not_reducing(reduced):
            _branch(
                first_finite,
                update_each_replica,
                lambda applied: advance(first, first_finite, applied),
            )

    # A branch whose body merges, as the inner optimizer's does, must itself be cross-replica.
    context = tf.distribute.get_replica_context()
    context.merge_call(in_cross_replica_context, args=(finite, step))


@contextlib.contextmanager
def _not_reducing(optimizers: Sequence[Any]) -> Iterator[None]:
    """Keep optimizers from summing over the replicas once more what is summed already.

    Keras has no public way: its TensorFlow optimizer sums in a method of its own, after clipping.
    """
    for optimizer in optimizers:
        if not callable(getattr(optimizer, REDUCTION, None)):
            raise BackendError(
                "This Keras sums gradients over replicas in a way that kerasmp does not know.",
                received=f"Keras {keras.__version__}, optimizer {type(optimizer).__name__}",
                expected=f"a method `{REDUCTION}`",
                fix="Train on one replica, or with a Keras version that CHANGELOG.md names.",
            )
        # Around Keras's own __setattr__: this is no state.
        object.__setattr__(optimizer, REDUCTION, lambda grads_and_vars: grads_and_vars)
    try:
        yield
    finally:
        for optimizer in optimizers:
            object.__delattr__(optimizer, REDUCTION)


def _branch(finite: Any, update: Callable[[], None], advance: Callable[[bool], None]) -> None:
    def applied() -> None:
        update()
        advance(True)

    tf.cond(tf.reduce_all(finite), applied, lambda: advance(False))


@tf.autograph.experimental.do_not_convert  # its conditions are about now, not about the graph
def start_as(variable: Any, other: Any) -> None:
    """Give a variable that holds nothing but zeros the value of another one."""
    # Now, also while a graph is traced, which would run without this the next time.
    with tf.init_scope():
        source = other.value if isinstance(other, keras.Variable) else other
        if not source.is_initialized():  # the same trace is just making it
            return
        # A checkpoint that was restored before the build gives variables their values as they are
        # made. While a trace makes one, it has none.
        if not variable.value.is_initialized() or not tf.reduce_any(tf.not_equal(variable, 0)):
            variable.assign(source)


def keep_apart(variable: Any, other: Any) -> None:
    """Nothing to do: variables of TensorFlow never share their memory."""


def add_to(variable: Any, value: Any) -> None:
    """Add to a variable, in one kernel where Keras takes three."""
    variable.value.assign_add(tf.constant(value, variable.value.dtype), read_value=False)


def matmul_wide(left: Any, right: Any, dtype: str) -> Any:
    """Return the matrix product in `dtype`, without rounding it to that of the factors.

    The factors are cast first. `tf.matmul(..., output_type=)` takes float16 and gives float32 under
    XLA alone, and has no gradient then; on a CPU it is no faster.
    """
    return tf.matmul(tf.cast(left, dtype), tf.cast(right, dtype))


def has_flash_attention(query: Any, key: Any, value: Any, *, is_causal: bool) -> bool:  # noqa: ARG001
    """Return whether Keras would use flash attention here: it has none on TensorFlow."""
    return False


def branch(condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """Do one or the other, by a scalar bool tensor. The host reads it, as Keras's does."""
    tf.cond(condition, yes, no)


def sync(model: Any) -> None:
    """Make the variables current: TensorFlow's always are."""


def in_dtype(variable: Any, dtype: str) -> tuple[Any, Callable[[], None]]:
    """Return a variable in another dtype, otherwise alike, and what puts back what this changed.

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


def mixes_dtypes(error: Exception) -> bool:
    """Return whether an error says that operands of different float dtypes met."""
    kinds = (TypeError, ValueError, tf.errors.InvalidArgumentError)
    return isinstance(error, kinds) and MIXED_DTYPES.search(str(error)) is not None


def train_step(
    model: Any,
    optimizers: Sequence[Any],
    step: Callable[..., Any],
    logs_after: Callable[[Any, Any], Any],
    data: Any,
) -> Any:
    """Run a train step and undo its traces if an optimizer skipped.

    Reads before the step alias the variables' buffers, and the branch that puts values back runs
    in skipped steps only.

    Args:
        model: The model.
        optimizers: Those of ours that the step may use.
        step: The step, which takes `data` and returns logs.
        logs_after: Makes of the logs, and whether the step was skipped, those to return.
        data: The batch.
    """
    if tf.executing_eagerly() and not model.built:
        # What the step itself would make could not be put back. A graph is traced again instead.
        model(keras.utils.unpack_x_y_sample_weight(data)[0], training=False)
    guarded = [v for v in (*states_of(model), *model.metrics_variables) if v.dtype != "string"]
    before = [tf.identity(v.value) for v in guarded]
    skips = [o.skips() for o in optimizers]
    known = {id(v) for v in model.metrics_variables}
    logs = step(data)
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


# The products that a user's layer may call itself; `kerasmp.backend.products` counts them.
PRODUCTS = (
    (tf, "matmul"),
    (tf.linalg, "matmul"),
    (tf, "einsum"),
    (tf.linalg, "einsum"),
    (tf, "tensordot"),
    (tf.linalg, "tensordot"),
)


def eagerly() -> Any:
    """Let all be computed when it is called; all is, but for `COMPILED`."""
    return contextlib.nullcontext()


def _body(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function.python_function(*args, **kwargs)


# Where a call is watched a user's `tf.function` runs its body, as it would in all threads under
# `tf.config.run_functions_eagerly`: the class, its method, and what takes what watches and that.
COMPILED = ((type(tf.function(lambda: None)), "__call__", lambda *_: _body),)
