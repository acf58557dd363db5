"""What only TensorFlow needs: sparse gradients, and replicas that must agree before they branch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from kerasmp.errors import BackendError

Update = Callable[[Sequence[Any], Sequence[Any]], None]
Advance = Callable[[bool, Any], None]


def dense_values(gradient: Any) -> Any:
    """Return the numbers of a gradient; those of `IndexedSlices` without densifying them."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def with_values(gradient: Any, values: Any) -> Any:
    """Return `gradient` with other numbers at the same places."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values


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


def run_step(
    bad: Any, grads: Sequence[Any], variables: Sequence[Any], update: Update, advance: Advance
) -> None:
    """Update the variables if no replica holds a bad gradient, else only move the scale.

    Args:
        bad: Float vector, 1 for each gradient of this replica that is not finite.
        grads: This replica's gradients, unreduced.
        variables: The variables that `grads` belong to.
        update: Called with `grads` and `variables`, in each replica, if all is finite.
        advance: Called once with whether all was finite, and with `bad` summed over replicas.

    Raises:
        BackendError: If called in a cross-replica context, where gradients have no replica.
    """
    if not tf.distribute.has_strategy():
        _branch(bad, lambda: update(grads, variables), advance)
        return
    if tf.distribute.in_cross_replica_context():
        raise BackendError(
            "apply() has no replica whose gradients it could check.",
            received="a call in cross-replica context",
            expected="a call in a replica context",
            fix="Call it inside the function that you give to strategy.run().",
        )
    context = tf.distribute.get_replica_context()
    # Before any branch: a replica that branched on its own flag would apply what the others skip
    # (MirroredStrategy) or wait for ever in a collective (MultiWorkerMirroredStrategy).
    bad = context.all_reduce(tf.distribute.ReduceOp.SUM, bad)
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        _branch(bad, lambda: update(grads, variables), advance)
        return

    def in_cross_replica_context(
        strategy: Any, bad: Any, grads: Sequence[Any], variables: Sequence[Any]
    ) -> None:
        agreed = strategy.experimental_local_results(bad)[0]

        def update_each_replica() -> None:
            strategy.extended.call_for_each_replica(update, args=(grads, variables))

        _branch(agreed, update_each_replica, advance)

    # A branch whose body merges, as the inner optimizer's does, must itself be cross-replica.
    context.merge_call(in_cross_replica_context, args=(bad, grads, variables))


def _branch(bad: Any, update: Callable[[], None], advance: Advance) -> None:
    def applied() -> None:
        update()
        advance(True, bad)

    tf.cond(tf.reduce_any(bad > 0), lambda: advance(False, bad), applied)


def start_as(variable: Any, other: Any) -> None:
    """Give a new variable the value of another one."""
    # Now, also while a graph is traced, which would run without this the next time.
    with tf.init_scope():
        if other.value.is_initialized():  # else the same trace is just making it
            variable.assign(other.value)


def sync(model: Any) -> None:
    """Make the variables current: TensorFlow's always are."""


def train_step(model: Any, parent: Callable[..., Any], data: Any) -> Any:
    """Run the parent's train step and undo its traces if the optimizer skipped.

    Reads before the step alias the variables' buffers, and the branch that puts values back runs
    in skipped steps only.
    """
    if tf.executing_eagerly() and not model.built:
        # What the step itself would make could not be put back. A graph is traced again instead.
        model(keras.utils.unpack_x_y_sample_weight(data)[0], training=False)
    guarded = [
        v for v in (*model.non_trainable_variables, *model.metrics_variables) if v.dtype != "string"
    ]
    before = [tf.identity(v.value) for v in guarded]
    known = {id(v) for v in model.metrics_variables}
    logs = parent(data)
    if not model.optimizer.built:  # nothing is trainable
        return logs
    late = [m for m in model.metrics if not known.issuperset(id(v) for v in m.variables)]

    def restore() -> None:
        for variable, value in zip(guarded, before, strict=True):
            variable.assign(value)
        for metric in late:
            metric.reset_state()

    skipped = ops.convert_to_tensor(model.optimizer.consecutive_skips_variable) > 0
    tf.cond(skipped, restore, lambda: None)
    return model.get_metrics_result()
