"""Steps of several replicas on TensorFlow, which must agree before they branch."""

from __future__ import annotations

import contextvars
import weakref
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from kerasmp.backend.protocol import Backend
from kerasmp.backend.tensorflow_gradients import compiled_by_xla
from kerasmp.backend.tensors import accumulation_dtype
from kerasmp.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Replicas(Backend):
    """The methods of `Backend` that concern replicas, and the step that they take together."""

    # Keras's method that sums gradients over replicas; tests/backend/test_keras_reduction.py fails
    # if it moves.
    ALL_REDUCE_METHOD = "_all_reduce_sum_gradients"

    def trace_context(self) -> tuple[Any, Any]:
        """Return keys for the current replica and the current trace, each None if there is none."""
        context = tf.distribute.get_replica_context()
        replica = None if context is None else context.replica_id_in_sync_group
        graph = None if tf.executing_eagerly() else weakref.ref(tf.compat.v1.get_default_graph())
        return replica if isinstance(replica, int) else None, graph

    def has_single_replica(self) -> bool:
        """Return whether no distribution strategy is active."""
        return not tf.distribute.has_strategy()

    def require_replica_context(self) -> None:
        """Raise in a cross-replica context, where a step has no gradients of its own.

        Raises:
            BackendError: In a cross-replica context.
        """
        if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
            raise BackendError(
                "apply() was called outside of a replica, where there are no gradients to check.",
                received="a call in cross-replica context",
                expected="a call in a replica context",
                fix="Call it inside the function that you pass to strategy.run().",
            )

    def all_reduce(
        self, grads: Sequence[Any], variables: Sequence[Any], losses: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the gradients summed over all replicas, and whether all losses were finite.

        All replicas see the same sums, so all make the same decision. A replica that branched on
        its own gradients would apply what the others skip (MirroredStrategy) or wait forever in a
        collective (MultiWorkerMirroredStrategy). The check also sees an overflow that happens only
        in the sum, and clipping, which comes later, uses the gradient of the whole batch. Rows of
        sparse gradients are gathered and not summed here, so an overflow that happens only when
        duplicate rows are added, near the largest float32, is not seen.

        Args:
            grads: This replica's gradients; some may be None.
            variables: The variables that they belong to.
            losses: The losses of this replica; empty if unknown.

        Returns:
            The gradients and the losses. With several replicas, one value stands for all losses:
            NaN if any loss on any replica is inf or NaN.
        """
        grads = list(grads)
        if not _has_several_replicas():
            return grads, losses
        context = tf.distribute.get_replica_context()
        sent = [None if g is None else self._in_accumulation_dtype(g) for g in grads]
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
        # A "gradient" that is a new value, such as a float8 scale, is averaged.
        share = 1.0 / context.num_replicas_in_sync
        return [
            g * share if g is not None and getattr(v, "overwrite_with_gradient", False) else g
            for g, v in zip(received, variables, strict=True)
        ], losses

    def _in_accumulation_dtype(self, gradient: Any) -> Any:
        values = self.dense_values(gradient)
        return self.replace_values(gradient, tf.cast(values, accumulation_dtype(values)))

    def all_reduce_once(self, optimizers: Sequence[Any]) -> None:
        """Keep optimizers from summing over the replicas again what the step has summed.

        Keras has no public way to do so: its TensorFlow optimizer sums in a private method, after
        clipping. The method is replaced permanently, so that no step has to change it.
        """
        if not _has_several_replicas():
            return
        name = self.ALL_REDUCE_METHOD
        for optimizer in optimizers:
            if not callable(getattr(optimizer, name, None)):
                raise BackendError(
                    "This version of Keras sums gradients over replicas in an unknown way.",
                    received=f"Keras {keras.__version__}, optimizer {type(optimizer).__name__}",
                    expected=f"a method `{name}`",
                    fix="Train on one replica, or with a Keras version that CHANGELOG.md names.",
                )
            # Bypass Keras's __setattr__: this is no state to track.
            object.__setattr__(optimizer, name, _AllReduceOnce(optimizer, name))

    def run_step(
        self,
        step: Any,
        finite: Any,
        update: Callable[[Any, Any], None],
        advance: Callable[[Any, Any, bool], None],
        *,
        fused: bool,
    ) -> None:
        """Update the variables if all gradients are finite; advance the scale in any case."""
        if fused and compiled_by_xla():
            # XLA copies everything that a branch may change, so the update runs outside of it.
            update(step, tf.reduce_all(finite))
            _branch(step, finite, lambda: None, advance)
            return
        if not tf.distribute.has_strategy():
            _branch(step, finite, lambda: update(step, None), advance)
            return

        def update_replica(step: Any) -> None:
            # Set here, in the thread of the replica.
            token = _IS_REDUCED.set(_has_several_replicas())
            try:
                update(step, None)
            finally:
                _IS_REDUCED.reset(token)

        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            _branch(step, finite, lambda: update_replica(step), advance)
            return

        def in_cross_replica_context(strategy: Any, finite: Any, steps: Any) -> None:
            def update_replicas() -> None:
                strategy.extended.call_for_each_replica(update_replica, args=(steps,))

            local = strategy.experimental_local_results
            _branch(local(steps)[0], local(finite)[0], update_replicas, advance)

        # The inner optimizer merges replicas; a branch around that must be cross-replica itself.
        context = tf.distribute.get_replica_context()
        context.merge_call(in_cross_replica_context, args=(finite, step))


def _branch(
    step: Any,
    finite: Any,
    update: Callable[[], None],
    advance: Callable[[Any, Any, bool], None],
) -> None:
    def applied() -> None:
        update()
        advance(step, finite, True)

    tf.cond(tf.reduce_all(finite), applied, lambda: advance(step, finite, False))


def _has_several_replicas() -> bool:
    return bool(tf.distribute.get_strategy().num_replicas_in_sync > 1)


# Whether the gradients of the step that runs in this thread are summed over the replicas already.
_IS_REDUCED: contextvars.ContextVar[bool] = contextvars.ContextVar("_IS_REDUCED", default=False)


class _AllReduceOnce:
    """Replaces an optimizer's method that sums gradients over replicas.

    Args:
        optimizer: The optimizer.
        name: The name of the method.
    """

    def __init__(self, optimizer: Any, name: str) -> None:
        self._optimizer = optimizer
        self._name = name

    def __call__(self, grads_and_vars: Any) -> Any:
        if _IS_REDUCED.get():
            return grads_and_vars
        return getattr(type(self._optimizer), self._name)(self._optimizer, grads_and_vars)
