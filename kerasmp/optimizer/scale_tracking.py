"""Whether a train step has scaled its loss, which `apply` must know to unscale the gradients."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.by_identity import ByIdentity
from kerasmp.backend.running_steps import innermost_step
from kerasmp.errors import LossScaleError, LossScaleWarning
from kerasmp.loss_scale import FixedLossScale, NoLossScale

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer

# Whether an optimizer was asked for its scale. What was traced then, such as an inner function, may
# scale a loss again without calling this code. Keras's own step does not count, since it asks each
# time. This is not an attribute of the optimizer: a step must not set attributes, since another
# thread may be using the optimizer.
_HAVE_SCALED: ByIdentity[bool] = ByIdentity()
# The optimizers by which a model has applied scaled gradients, previous ones included.
_SCALED_BY: ByIdentity[list[weakref.ref[Any]]] = ByIdentity()
# The name and the own variables of a stock optimizer that scaled the loss in traced steps of a
# model. The variables are kept alive because the traces need the scale, and TensorFlow's error for
# a missing one would not explain it. The optimizer itself is not, since it may hold the model.
_STOCK_SCALE: ByIdentity[tuple[str, list[Any]] | None] = ByIdentity()
# Whether a stock optimizer has ever been recorded in `_STOCK_SCALE`. A model forgets its compiled
# step, but this stays.
_STOCK_TRACED: ByIdentity[bool] = ByIdentity()
# Whether the user was warned that the step does not scale the loss by an optimizer.
_WARNED: ByIdentity[bool] = ByIdentity()


def record_scaling(optimizer: LossScaleOptimizer, what: str) -> None:
    """Record that the scale of an optimizer is asked for, to scale a loss or to unscale gradients.

    Outside of a train step, only traced code counts, since it may run in one.

    Args:
        optimizer: The optimizer.
        what: What asks, for the message.

    Raises:
        LossScaleError: If the step has applied gradients on the assumption that they are unscaled.
    """
    if _is_always_1(optimizer):
        return
    call = innermost_step()
    if call is None:
        if not _HAVE_SCALED.get(optimizer) and backend.current().is_traced():
            _HAVE_SCALED[optimizer] = True
        return
    if _contains(call.unscaled, optimizer):
        raise _unknown_scaling(
            f"{what} after an apply in the same step, which found that no loss was scaled",
            "a loss that is scaled before gradients are applied",
            "Call scale_loss earlier in the train step than apply.",
        )
    if not _contains(call.scaled, optimizer):
        call.scaled.append(optimizer)
        if not call.of_keras:
            _HAVE_SCALED[optimizer] = True


def record_read(optimizer: LossScaleOptimizer, what: str) -> None:
    """Record that the scale of an optimizer is read, perhaps to multiply a loss by it.

    After the gradients were applied, the scale is only read for logs.

    Args:
        optimizer: The optimizer.
        what: What is read, for the message.
    """
    call = innermost_step()
    if call is None or not _contains(call.unscaled, optimizer):
        record_scaling(optimizer, what)


def is_loss_scaled(optimizer: LossScaleOptimizer) -> bool:
    """Return whether the gradients that are applied now must be divided by the scale.

    The answer is no only in the train step of a kerasmp model, if nothing has ever asked the
    optimizer, or a previous one of the model, for its scale.

    Args:
        optimizer: The optimizer.

    Raises:
        LossScaleError: If the step, or the model in other steps, has asked only other optimizers
            for their scale, or a previous stock optimizer.

    Warns:
        LossScaleWarning: Once for each optimizer, if the loss is not scaled, or if code that was
            traced for a previous optimizer may scale it.
    """
    call = innermost_step()
    if call is None or _is_always_1(optimizer):
        return True
    if _HAVE_SCALED.get(optimizer):
        _add_scaled_by(call.model, optimizer)
        return True
    if call.of_keras and _contains(call.scaled, optimizer):
        return True
    if not _contains(call.unscaled, optimizer):
        stock = _STOCK_SCALE.get(call.model)
        if stock is not None:
            raise _scaled_by_stock(optimizer, stock[0])
        known = _SCALED_BY.get(call.model) or []
        others = call.scaled or [o for o in (ref() for ref in known) if _holds(call.model, o)]
        if others:
            raise _scaled_by_others(optimizer, others)
        if known:
            _warn_once(optimizer, call.model, _scaled_by_previous)
            return True
        _warn_once(optimizer, call.model, _not_scaled)
        call.unscaled.append(optimizer)
    return False


def record_replacement(model: Any) -> None:
    """Record that the optimizer of a model is about to be replaced.

    Code that was traced with it may go on scaling the loss by its scale.
    """
    optimizer: Any = getattr(model, "optimizer", None)
    if _HAVE_SCALED.get(optimizer):
        _add_scaled_by(model, optimizer)
    elif _is_scaling_stock(optimizer) and (
        getattr(model, "train_function", None) is not None or _STOCK_TRACED.get(optimizer)
    ):
        own = [each for each in vars(optimizer).values() if isinstance(each, keras.Variable)]
        _STOCK_SCALE[model] = (optimizer.name, own)
        _STOCK_TRACED[optimizer] = True


def undo_replacement(model: Any, optimizer: Any) -> Callable[[], None]:
    """Return a function that undoes the next `record_replacement` of a model.

    It does nothing while the model has another optimizer. If the optimizer is replaced after all,
    `record_replacement` records that again.

    Args:
        model: The model.
        optimizer: Its present optimizer.
    """
    stock, was_known = _STOCK_SCALE.get(model), _is_scaled_by(model, optimizer)

    def undo() -> None:
        if getattr(model, "optimizer", None) is not optimizer:
            return
        _STOCK_SCALE[model] = stock
        if not was_known and _is_scaled_by(model, optimizer):
            known = _SCALED_BY.get(model) or []
            _SCALED_BY[model] = [ref for ref in known if ref() is not optimizer]

    return undo


def _is_scaling_stock(optimizer: Any) -> bool:
    """Return whether a stock optimizer scales the loss, which this module cannot see."""
    wrapper = keras.optimizers.LossScaleOptimizer
    is_stock = isinstance(optimizer, wrapper) and not hasattr(optimizer, "schedule")
    return is_stock or bool(getattr(optimizer, "loss_scale_factor", None))


def _is_always_1(optimizer: LossScaleOptimizer) -> bool:
    schedule = optimizer.schedule
    return isinstance(schedule, NoLossScale | FixedLossScale) and schedule.initial_scale == 1


def _add_scaled_by(model: Any, optimizer: Any) -> None:
    if not _is_scaled_by(model, optimizer):
        _SCALED_BY[model] = [*(_SCALED_BY.get(model) or []), weakref.ref(optimizer)]


def _is_scaled_by(model: Any, optimizer: Any) -> bool:
    return any(ref() is optimizer for ref in _SCALED_BY.get(model) or [])


def _holds(model: Any, optimizer: Any) -> bool:
    """Return whether an optimizer is still in an attribute of a model, or in a list or dict."""
    values = list(vars(model).values())
    listed = [x for each in values if isinstance(each, list | tuple) for x in each]
    named = [x for each in values if isinstance(each, dict) for x in each.values()]
    return optimizer is not None and _contains([*values, *listed, *named], optimizer)


def _contains(optimizers: Sequence[Any], optimizer: Any) -> bool:
    return any(each is optimizer for each in optimizers)


# ------------------------------------------------------------------------------ errors, warnings


def _unknown_scaling(received: str, expected: str, fix: str) -> LossScaleError:
    return LossScaleError(
        "apply cannot know whether its gradients come from a scaled loss.",
        received=received,
        expected=expected,
        fix=fix,
    )


def _scaled_by_others(optimizer: LossScaleOptimizer, others: Sequence[Any]) -> LossScaleError:
    return _unknown_scaling(
        f"gradients for {optimizer.name!r} in a step or a model that has scaled losses only by "
        f"{', '.join(repr(other.name) for other in others)}",
        "a loss that is scaled by the optimizer that applies its gradients",
        "Call scale_loss of each optimizer, and apply the resulting gradients with the same "
        "optimizer. If several optimizers share one loss, wrap a keras.optimizers.MultiOptimizer "
        "in one LossScaleOptimizer. If an optimizer needs no scaling, use "
        "LossScaleOptimizer(..., loss_scale=None) for it.",
    )


def _scaled_by_stock(optimizer: LossScaleOptimizer, previous: str) -> LossScaleError:
    return _unknown_scaling(
        f"gradients for {optimizer.name!r}, which was not asked for its scale, in a model whose "
        f"steps were traced with the stock optimizer {previous!r}",
        "a loss that is scaled by the optimizer that applies its gradients",
        "Compile again the functions that you compiled yourself (tf.function, jax.jit): their "
        "traces keep the previous scale and dtypes. In a step that does not scale the loss, call "
        "self.optimizer.scale_loss(loss), or compile the model with "
        "kerasmp.LossScaleOptimizer(optimizer, loss_scale=None).",
    )


def _scaled_by_previous(optimizer: LossScaleOptimizer, model: Any) -> str:
    return (
        f"The train step of {model.name!r} did not ask {optimizer.name!r} for its scale, but the "
        "previous optimizer. The gradients are divided by the scale, since code that was traced "
        "then may scale the loss. If it does not, create the model again, or compile it with "
        "kerasmp.LossScaleOptimizer(optimizer, loss_scale=None)."
    )


def _not_scaled(optimizer: LossScaleOptimizer, model: Any) -> str:
    scaling = "scaled = self.optimizer.scale_loss(loss)"
    if backend.current().NEEDS_PURE_STEP:
        how = (
            "In the function that is differentiated, write `with keras.StatelessScope(list(zip("
            f"self.optimizer.variables, optimizer_variables))): {scaling}` and return `scaled`"
        )
    else:
        how = f"Write `{scaling}` and differentiate `scaled`"
    return (
        f"The train step of {model.name!r} does not scale the loss, so {optimizer.name!r} does not "
        f"unscale the gradients, and small gradients of float16 layers become 0. {how}. Keep using "
        "`loss` for metrics and logs. If the loss should not be scaled, compile with "
        "kerasmp.LossScaleOptimizer(optimizer, loss_scale=None)."
    )


def _warn_once(
    optimizer: LossScaleOptimizer,
    model: Any,
    message: Callable[[LossScaleOptimizer, Any], str],
) -> None:
    if not _WARNED.get(optimizer):
        warnings.warn(message(optimizer, model), LossScaleWarning, stacklevel=2)
        _WARNED[optimizer] = True
