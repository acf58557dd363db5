"""The guard around a train step, Keras's or a user's own: a skipped step leaves no trace."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.by_identity import ByIdentity
from kerasmp.backend.calls import Call, entered, running
from kerasmp.model.find_optimizers import find_optimizers
from kerasmp.model.hints import dtype_hints
from kerasmp.model.inference import refuse_training
from kerasmp.optimizer import LossScaleOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Of models, whether Keras's own step had its part in the last guarded one. Not an attribute of the
# model: a step sets none, since another thread may be using it.
_BY_KERAS: ByIdentity[bool] = ByIdentity()


def guarded(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `train_step` that undoes what a skipped step did.

    Of steps that call each other by `super()` the outermost alone is guarded.

    Args:
        step: The method `train_step` of a model of ours, of a mixin or of a user's subclass.
    """

    @functools.wraps(step)
    def train_step(model: Any, *args: Any, **kwargs: Any) -> Any:
        if running(model):
            return step(model, *args, **kwargs)
        refuse_training(model)  # of a loop of the user's own: `fit` has done so
        with entered(model) as call, dtype_hints():
            return _run(call, functools.partial(step, model, **kwargs), args)

    return train_step


def losses_noted(update: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method by which Keras's step on JAX updates metrics, which notes the loss."""

    @functools.wraps(update)
    def update_metrics(model: Any, variables: Any, unscaled_loss: Any, *args: Any) -> Any:
        call = running(model)
        if call:
            call.losses.append(unscaled_loss)
        return update(model, variables, unscaled_loss, *args)

    return update_metrics


@contextlib.contextmanager
def kerass_own(model: Any) -> Iterator[None]:
    """Let Keras's own train step have its part in the one that runs.

    What it scales, it applies: that tells nothing of gradients of the user's own before or after.
    """
    call = running(model)
    if call:
        call.by_keras = True
    with entered(model, of_keras=True):
        yield


def no_step_is_nan(model: Any) -> bool:
    """Return whether metrics over no step are to be NaN: where Keras's own steps are guarded.

    Not within the step, whose logs have the numbers of its batch then.
    """
    return bool(_BY_KERAS.get(model)) and not running(model)


def nan_of_nothing(model: Any, results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a model's metrics, NaN for each that has seen nothing.

    One that keeps nothing but 0 may have seen perfect numbers: if the loss has seen some. And one
    that starts with other numbers does not hide what the loss has not seen.

    Args:
        model: The model.
        results: What Keras's `get_metrics_result` returned.
    """
    counts = {key: keras.ops.cast(count, "float32") for key, count in _counts(model).items()}
    if not counts:
        return results
    of_any = sum(counts.values())
    of_loss = counts.get("loss", of_any)

    def unless_of_nothing(key: str, value: Any) -> Any:
        return _unless_of_nothing(counts.get(key, of_any) + of_loss, value, float("nan"))

    return {
        key: keras.tree.map_structure(functools.partial(unless_of_nothing, key), value)
        for key, value in results.items()
    }


def numbers_of_batch(result_or_logs: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method that makes logs of an epoch, which has no 0 for an average over nothing.

    The metric was never asked, or every step of the epoch was skipped: the logs of the last step
    say what they know.
    """

    @functools.wraps(result_or_logs)
    def metrics_result_or_logs(model: Any, logs: Any) -> Any:
        result = result_or_logs(model, logs)
        if result is logs:
            return result
        counts = _counts(model)
        all_alike = counts.get("loss") if _BY_KERAS.get(model) else None
        # A test step of the user's own need not ask the loss, whatever it asks.
        is_own = getattr(model.test_step, "__func__", None) is not keras.Model.test_step
        known = counts if is_own or all_alike is None else {}
        return {
            key: _unless_of_nothing(known.get(key, all_alike), value, logs[key])
            for key, value in result.items()
        }

    return metrics_result_or_logs


def _run(call: Call, step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    model = call.model
    optimizers = [o for o in find_optimizers(model).values() if isinstance(o, LossScaleOptimizer)]
    if not optimizers:
        logs = step(*args)
        model._warn_if_too_late()  # noqa: SLF001 - the model's own step
        return logs

    def logs_after(logs: Any, skipped: Any) -> Any:
        return _logs(model, logs, skipped, by_keras=call.by_keras)

    logs = backend.current().train_step(model, optimizers, step, logs_after, *args)
    _BY_KERAS[model] = call.by_keras
    return logs


def _logs(model: Any, logs: Any, skipped: Any, *, by_keras: bool) -> Any:
    """Return the logs of a step without what a skipped one left in them.

    Args:
        model: The model, whose metrics are put back already.
        logs: What the step returned.
        skipped: Whether it was skipped, a scalar bool tensor.
        by_keras: Whether Keras's step made them. In a user's own step it is not known whether a
            metric was asked at all, or what goes by its name is the number of this batch.
    """
    if not isinstance(logs, dict):
        return logs
    after, counts = model.get_metrics_result(), _counts(model)
    all_alike = counts.get("loss") if by_keras else None

    def put_back(key: str, value: Any) -> Any:
        if isinstance(value, dict):  # of Keras's metric that holds those of `compile`
            return {key: put_back(key, inner) for key, inner in value.items()}
        if key not in after:
            return value
        # No step was good yet, or the metric was never asked: the number of this batch is true.
        count = counts.get(key) if all_alike is None else all_alike
        known = _unless_of_nothing(count, after[key], value)
        return known if by_keras else keras.ops.where(skipped, known, value)

    return {key: put_back(key, value) for key, value in logs.items()}


def _counts(model: Any) -> dict[str, Any]:
    """Return how much metrics have seen, by the names of their results: not 0 if anything at all.

    Those that average say how much. Any other has seen something if not all that it keeps is 0.
    """
    counts: dict[str, Any] = {}
    for metric in model.metrics:
        means = [
            each
            for each in (metric, *getattr(metric, "metrics", ()))  # those of `compile` are in one
            if isinstance(each, keras.metrics.Mean)
        ]
        kept = [v for v in metric.variables if v.dtype != "string"]
        if means:
            count = sum(each.count for each in means)
        elif kept:
            count = sum(keras.ops.sum(keras.ops.cast(v != 0, "float32")) for v in kept)
        else:
            continue
        result = None if metric in means else metric.result()
        names = result if isinstance(result, dict) else [metric.name]
        counts |= dict.fromkeys(names, count)
    return counts


def _unless_of_nothing(count: Any, average: Any, other: Any) -> Any:
    """Return an average, or the other number if it is over nothing; `count` may be None."""
    return average if count is None else keras.ops.where(count > 0, average, other)
