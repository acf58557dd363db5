"""Whether a train step has scaled its loss: `apply` must know what its gradients are of."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import keras

from kerasmp import backend
from kerasmp.backend.by_identity import ByIdentity
from kerasmp.backend.calls import innermost
from kerasmp.errors import LossScaleError, LossScaleWarning
from kerasmp.loss_scale import FixedLossScale, NoLossScale

if TYPE_CHECKING:
    from collections.abc import Callable

    from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer

# Of optimizers, whether they were asked for their scale. What was traced then, an inner function
# say, may scale a loss again without a word to us; not so Keras's own step, which asks each time.
# No attributes: a step sets none, since another thread may be using them.
_HAVE_SCALED: ByIdentity[bool] = ByIdentity()
# For each model those that it has applied scaled gradients by, of before too.
_OF_MODELS: ByIdentity[list[weakref.ref[Any]]] = ByIdentity()
# Of models, one of Keras's that scaled their loss in a step that was traced: its name, and its own
# variables. They are held: what was traced needs its scale, and where that is gone TensorFlow says
# so in words of its own. Not the optimizer, which may hold the model.
_OF_KERAS: ByIdentity[tuple[str, list[Any]] | None] = ByIdentity()
# Of optimizers of Keras's, whether they were such a one. A model forgets its step, they do not.
_TRACED: ByIdentity[bool] = ByIdentity()
# Of optimizers, whether their user was told that the step scales no loss.
_TOLD: ByIdentity[bool] = ByIdentity()


def note_scaling(optimizer: LossScaleOptimizer, what: str) -> None:
    """Note that an optimizer's scale is asked for, to scale a loss or gradients by it.

    Outside of a train step only what is traced counts: it may run within one.

    Args:
        optimizer: The optimizer.
        what: What asks, for the message.

    Raises:
        LossScaleError: If the step has applied gradients that were taken for unscaled ones.
    """
    if _is_always_1(optimizer):
        return
    call = innermost()
    if call is None:
        if not _HAVE_SCALED.get(optimizer) and backend.current().is_traced():
            _HAVE_SCALED[optimizer] = True
        return
    if _holds(call.unscaled, optimizer):
        raise LossScaleError(
            "apply cannot know whether its gradients are those of a scaled loss.",
            received=f"{what} after an apply of the same step, which found that no loss was scaled",
            expected="the loss scaled before gradients are applied",
            fix="Call scale_loss earlier in the train step than apply.",
        )
    if not _holds(call.scaled, optimizer):
        call.scaled.append(optimizer)
        if not call.of_keras:
            _HAVE_SCALED[optimizer] = True


def note_reading(optimizer: LossScaleOptimizer, what: str) -> None:
    """Note that an optimizer's scale is read, maybe to scale a loss by hand.

    After the gradients were applied it is for the logs.

    Args:
        optimizer: The optimizer.
        what: What is read, for the message.
    """
    call = innermost()
    if call is None or not _holds(call.unscaled, optimizer):
        note_scaling(optimizer, what)


def is_scaled(optimizer: LossScaleOptimizer) -> bool:
    """Return whether gradients that are applied now are to be divided by the scale.

    They are not if a train step of a model of ours applies them, and nothing has ever asked the
    optimizer for its scale, nor one that the model had before.

    Args:
        optimizer: The optimizer.

    Raises:
        LossScaleError: If the step, or the model in other steps, has asked other optimizers only,
            or one of Keras's before.

    Warns:
        LossScaleWarning: Once for each optimizer whose loss is not scaled, or may be scaled by what
            was traced for one of before.
    """
    call = innermost()
    if call is None or _is_always_1(optimizer):
        return True
    if _HAVE_SCALED.get(optimizer):
        _mark(call.model, optimizer)
        return True
    if call.of_keras and _holds(call.scaled, optimizer):
        return True
    if not _holds(call.unscaled, optimizer):
        of_keras = _OF_KERAS.get(call.model)
        if of_keras is not None:
            raise _traced_before(optimizer, of_keras[0])
        marks = _OF_MODELS.get(call.model) or []
        others = call.scaled or [o for o in (mark() for mark in marks) if _keeps(call.model, o)]
        if others:
            raise _unknown_loss(optimizer, others)
        if marks:
            _warn_of_predecessor(optimizer, call.model)
            return True
        _warn(optimizer, call.model)
        call.unscaled.append(optimizer)
    return False


def note_successor(model: Any) -> None:
    """Note that a model gets another optimizer, whose gradients may be scaled as those before."""
    optimizer: Any = getattr(model, "optimizer", None)
    if _HAVE_SCALED.get(optimizer):
        _mark(model, optimizer)
    elif _scales_unseen(optimizer) and (
        getattr(model, "train_function", None) is not None or _TRACED.get(optimizer)
    ):
        own = [each for each in vars(optimizer).values() if isinstance(each, keras.Variable)]
        _OF_KERAS[model] = (optimizer.name, own)
        _TRACED[optimizer] = True


def unnote_successor(model: Any, optimizer: Any) -> Callable[[], None]:
    """Return what takes the next `note_successor` of a model back, once it has its optimizer again.

    When another follows that one after all, the same is noted again. While the model has another,
    nothing is taken back.

    Args:
        model: The model.
        optimizer: The one that it has.
    """
    of_keras, was_marked = _OF_KERAS.get(model), _is_marked(model, optimizer)

    def take_back() -> None:
        if getattr(model, "optimizer", None) is not optimizer:
            return
        _OF_KERAS[model] = of_keras
        if not was_marked and _is_marked(model, optimizer):
            marks = _OF_MODELS.get(model) or []
            _OF_MODELS[model] = [mark for mark in marks if mark() is not optimizer]

    return take_back


def _scales_unseen(optimizer: Any) -> bool:
    stock = keras.optimizers.LossScaleOptimizer
    is_stock = isinstance(optimizer, stock) and not hasattr(optimizer, "schedule")  # not ours
    return is_stock or bool(getattr(optimizer, "loss_scale_factor", None))


def _mark(model: Any, optimizer: Any) -> None:
    if not _is_marked(model, optimizer):
        _OF_MODELS[model] = [*(_OF_MODELS.get(model) or []), weakref.ref(optimizer)]


def _is_marked(model: Any, optimizer: Any) -> bool:
    return any(mark() is optimizer for mark in _OF_MODELS.get(model) or [])


def _keeps(model: Any, optimizer: Any) -> bool:
    """Return whether a model still has an optimizer, which is then none of before."""
    held = list(vars(model).values())
    listed = [x for each in held if isinstance(each, list | tuple) for x in each]
    named = [x for each in held if isinstance(each, dict) for x in each.values()]
    return optimizer is not None and _holds([*held, *listed, *named], optimizer)


def _unknown_loss(optimizer: LossScaleOptimizer, others: list[Any]) -> LossScaleError:
    return LossScaleError(
        "apply cannot know whether its gradients are those of a scaled loss.",
        received=f"gradients for {optimizer.name!r} in a step, or a model, that has scaled losses "
        f"by {', '.join(repr(other.name) for other in others)} alone",
        expected="the loss scaled by the optimizer that applies its gradients",
        fix="Call scale_loss of each optimizer, and apply to it the gradients of that. One "
        "loss for several optimizers needs one LossScaleOptimizer around a "
        "keras.optimizers.MultiOptimizer. One that shall scale nothing is "
        "LossScaleOptimizer(..., loss_scale=None).",
    )


def _traced_before(optimizer: LossScaleOptimizer, before: str) -> LossScaleError:
    return LossScaleError(
        "apply cannot know whether its gradients are those of a scaled loss.",
        received=f"gradients for {optimizer.name!r}, which nothing has asked for its scale, in a "
        f"model whose steps were traced with Keras's {before!r}",
        expected="the loss scaled by the optimizer that applies its gradients",
        fix="Make the functions anew that you compiled yourself (tf.function, jax.jit): what they "
        "have traced keeps that scale, and the dtypes of then. A step that scales no loss shall "
        "do so, by self.optimizer.scale_loss(loss), or be compiled with "
        "kerasmp.LossScaleOptimizer(optimizer, loss_scale=None).",
    )


def _warn_of_predecessor(optimizer: LossScaleOptimizer, model: Any) -> None:
    if _TOLD.get(optimizer):
        return
    warnings.warn(
        f"The train step of {model.name!r} has asked not {optimizer.name!r} for its scale, but the "
        "optimizer before it. Gradients are divided by the scale, as if what was traced then "
        "scaled the loss. If it does not, make the model anew, or compile it with "
        "kerasmp.LossScaleOptimizer(optimizer, loss_scale=None).",
        LossScaleWarning,
        stacklevel=2,
    )
    _TOLD[optimizer] = True


def _warn(optimizer: LossScaleOptimizer, model: Any) -> None:
    if _TOLD.get(optimizer):
        return
    scaling = "scaled = self.optimizer.scale_loss(loss)"
    if backend.current().PURE:
        how = (
            "In the function that is differentiated, write `with keras.StatelessScope(list(zip("
            f"self.optimizer.variables, optimizer_variables))): {scaling}` and return `scaled`"
        )
    else:
        how = f"Write `{scaling}` and differentiate `scaled`"
    warnings.warn(
        f"The train step of {model.name!r} scales no loss, so {optimizer.name!r} takes its "
        "gradients as they are, and small ones of float16 layers become 0. "
        f"{how}; the loss itself stays for metrics and logs. If it shall not be scaled, compile "
        "with kerasmp.LossScaleOptimizer(optimizer, loss_scale=None).",
        LossScaleWarning,
        stacklevel=2,
    )
    _TOLD[optimizer] = True


def _is_always_1(optimizer: LossScaleOptimizer) -> bool:
    schedule = optimizer.schedule
    return isinstance(schedule, NoLossScale | FixedLossScale) and schedule.initial_scale == 1


def _holds(optimizers: list[Any], optimizer: Any) -> bool:
    return any(each is optimizer for each in optimizers)
