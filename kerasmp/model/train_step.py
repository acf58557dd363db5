"""Guards a train step, Keras's or a user-defined one, so that a skipped step changes nothing."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.by_identity import ByIdentity
from kerasmp.backend.running_steps import RunningStep, enter_step, running_step
from kerasmp.errors import PolicyError
from kerasmp.model.hints import dtype_hints
from kerasmp.model.optimizers import find_optimizers, warn_of_late_layers
from kerasmp.optimizer import LossScaleOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Whether Keras's own step took part in the last guarded step of a model. Not an attribute of the
# model: a step sets none, since another thread may be using the model.
_USED_KERAS_STEP: ByIdentity[bool] = ByIdentity()


def undo_skipped_steps(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `train_step` that undoes what a skipped step changed.

    If steps call each other through `super()`, only the outermost one is guarded.

    Args:
        step: The method `train_step` of a kerasmp model, a mixin or a user's subclass.
    """

    @functools.wraps(step)
    def train_step(model: Any, *args: Any, **kwargs: Any) -> Any:
        if running_step(model):
            return step(model, *args, **kwargs)
        refuse_training(model)  # for a custom loop; `fit` has checked already
        with enter_step(model) as running, dtype_hints():
            return _run(running, functools.partial(step, model, **kwargs), args)

    return train_step


def note_losses(update: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method that updates metrics in Keras's step on JAX, which also notes the loss."""

    @functools.wraps(update)
    def update_metrics(model: Any, variables: Any, unscaled_loss: Any, *args: Any) -> Any:
        running = running_step(model)
        if running:
            running.losses.append(unscaled_loss)
        return update(model, variables, unscaled_loss, *args)

    return update_metrics


@contextlib.contextmanager
def keras_step(model: Any) -> Iterator[None]:
    """Mark that Keras's own train step runs, as part of the model's step.

    It applies the gradients of the loss that it scaled. That says nothing about gradients that the
    user's part of the step computes before or after.
    """
    running = running_step(model)
    if running:
        running.by_keras = True
    with enter_step(model, of_keras=True):
        yield


def refuse_training(model: Any) -> None:
    """Raise if a model was converted for inference only: its variables are too coarse for updates.

    Raises:
        PolicyError: If so.
    """
    if not model._for_inference:  # noqa: SLF001 - its own package
        return
    dtypes = {v.dtype for v in model.trainable_variables} & {"float16", "bfloat16"}
    raise PolicyError(
        "The model was converted for inference only: most training updates are smaller than its "
        "variables can represent.",
        received=f'training of "{model.name}", whose variables are '
        f"{' and '.join(sorted(dtypes)) or 'too coarse'}",
        expected="predict, evaluate or a call",
        fix="To train, call restore() on the report that convert() returned, or train the original "
        "model under mixed_float16 and convert again.",
    )


def reports_nan(model: Any) -> bool:
    """Return whether metrics are NaN if every step was skipped: Keras's own steps were guarded.

    Not during a step, whose logs then contain the results of its batch.
    """
    return bool(_USED_KERAS_STEP.get(model)) and not running_step(model)


def nan_if_empty(model: Any, results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a model's metrics, with NaN for each metric that has seen nothing.

    A metric whose variables are all 0 may have seen perfect predictions: it has, if the loss has
    seen any. A metric whose variables start with other values does not keep the loss from NaN.

    Args:
        model: The model.
        results: What Keras's `get_metrics_result` returned.
    """
    counts = {key: keras.ops.cast(count, "float32") for key, count in _counts(model).items()}
    if not counts:
        return results
    of_any = sum(counts.values())
    of_loss = counts.get("loss", of_any)

    def or_nan(key: str, value: Any) -> Any:
        return _unless_empty(counts.get(key, of_any) + of_loss, value, float("nan"))

    return {
        key: keras.tree.map_structure(functools.partial(or_nan, key), value)
        for key, value in results.items()
    }


def batch_results(result_or_logs: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method that makes the logs of an epoch, without 0 for metrics that saw nothing.

    If a metric was never updated, or every step of the epoch was skipped, the result of the last
    batch takes its place.
    """

    @functools.wraps(result_or_logs)
    def metrics_result_or_logs(model: Any, logs: Any) -> Any:
        result = result_or_logs(model, logs)
        if result is logs:
            return result
        counts = _counts(model)
        of_loss = counts.get("loss") if _USED_KERAS_STEP.get(model) else None
        # A user's test step may update metrics without updating the loss.
        is_own = getattr(model.test_step, "__func__", None) is not keras.Model.test_step
        known = counts if is_own or of_loss is None else {}
        return {
            key: _unless_empty(known.get(key, of_loss), value, logs[key])
            for key, value in result.items()
        }

    return metrics_result_or_logs


def _run(running: RunningStep, step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    model = running.model
    optimizers = [o for o in find_optimizers(model).values() if isinstance(o, LossScaleOptimizer)]
    if not optimizers:
        logs = step(*args)
        warn_of_late_layers(model)
        return logs

    def logs_after(logs: Any, skipped: Any) -> Any:
        return _logs(model, logs, skipped, by_keras=running.by_keras)

    logs = backend.current().train_step(model, optimizers, step, logs_after, *args)
    _USED_KERAS_STEP[model] = running.by_keras
    return logs


def _logs(model: Any, logs: Any, skipped: Any, *, by_keras: bool) -> Any:
    """Return the logs of a step without the values that a skipped step put into them.

    Args:
        model: The model, whose metrics are restored already.
        logs: What the step returned.
        skipped: Whether the step was skipped, a scalar bool tensor.
        by_keras: Whether Keras's step made the logs. Those of a user's step may contain the result
            of this batch under the name of a metric, or a metric that was never updated.
    """
    if not isinstance(logs, dict):
        return logs
    after, counts = model.get_metrics_result(), _counts(model)
    of_loss = counts.get("loss") if by_keras else None

    def restored(key: str, value: Any) -> Any:
        if isinstance(value, dict):  # of the Keras metric that contains those of `compile`
            return {key: restored(key, inner) for key, inner in value.items()}
        if key not in after:
            return value
        # If no step was applied yet, or the metric was never updated, the batch's result is right.
        count = counts.get(key) if of_loss is None else of_loss
        known = _unless_empty(count, after[key], value)
        return known if by_keras else keras.ops.where(skipped, known, value)

    return {key: restored(key, value) for key, value in logs.items()}


def _counts(model: Any) -> dict[str, Any]:
    """Return how much each metric has seen, by the names of its results; 0 is nothing at all.

    Averages know their count. For any other metric it is the number of nonzero values that its
    variables hold.
    """
    counts: dict[str, Any] = {}
    for metric in model.metrics:
        means = [
            each
            for each in (metric, *getattr(metric, "metrics", ()))  # one contains those of `compile`
            if isinstance(each, keras.metrics.Mean)
        ]
        numeric = [v for v in metric.variables if v.dtype != "string"]
        if means:
            count = sum(each.count for each in means)
        elif numeric:
            count = sum(keras.ops.sum(keras.ops.cast(v != 0, "float32")) for v in numeric)
        else:
            continue
        result = None if metric in means else metric.result()
        names = result if isinstance(result, dict) else [metric.name]
        counts |= dict.fromkeys(names, count)
    return counts


def _unless_empty(count: Any, average: Any, other: Any) -> Any:
    """Return an average, or the other value if it is over nothing. The count may be None."""
    return average if count is None else keras.ops.where(count > 0, average, other)
