"""The guard around a train step, Keras's or a user's own: a skipped step leaves no trace."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.calls import Call, entered, running
from kerasmp.model.hints import dtype_hints
from kerasmp.model.inference import refuse_training
from kerasmp.model.own_optimizers import optimizers_of
from kerasmp.optimizer import LossScaleOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable


# The models in whose last guarded step Keras's own had its part. Not an attribute of the model: a
# step sets none, since another thread may be using it.
_BY_KERAS: weakref.WeakSet[Any] = weakref.WeakSet()


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


def note_kerass_own(model: Any) -> None:
    """Note that Keras's own train step has its part in the one that runs."""
    call = running(model)
    if call:
        call.by_keras = True


def no_step_is_nan(model: Any) -> bool:
    """Return whether metrics over no step are to be NaN: where Keras's own steps are guarded.

    Not within the step: the logs of one bad batch must not stop TerminateOnNaN's good run.
    """
    return model in _BY_KERAS and not running(model)


def _run(call: Call, step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    model = call.model
    optimizers = [o for o in optimizers_of(model).values() if isinstance(o, LossScaleOptimizer)]
    if not optimizers:
        logs = step(*args)
        model._warn_if_too_late()  # noqa: SLF001 - the model's own step
        return logs

    def logs_after(logs: Any, skipped: Any) -> Any:
        return _logs(model, logs, skipped, by_keras=call.by_keras)

    logs = backend.current().train_step(model, optimizers, step, logs_after, *args)
    (_BY_KERAS.add if call.by_keras else _BY_KERAS.discard)(model)
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
    after = model.get_metrics_result()
    if by_keras:
        return {key: after.get(key, value) for key, value in logs.items()}
    # What is averaged over nothing was never asked, or no step was good yet: NaN says more than 0.
    counts = {m.name: m.count for m in model.metrics if isinstance(m, keras.metrics.Mean)}

    def put_back(key: str, value: Any) -> Any:
        if isinstance(value, dict):  # of Keras's metric that holds those of `compile`
            return {key: put_back(key, inner) for key, inner in value.items()}
        return _put_back(skipped, after[key], value, counts.get(key)) if key in after else value

    return {key: put_back(key, value) for key, value in logs.items()}


def _put_back(skipped: Any, after: Any, value: Any, count: Any) -> Any:
    if count is not None:
        skipped = keras.ops.logical_and(skipped, keras.ops.greater(count, 0))
    return keras.ops.where(skipped, after, value)
