"""What a conversion does to the model beside its layers: class, optimizer, compiled steps."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_private import flatten_layers
from kerasmp.errors import LossScaleWarning, PolicyWarning
from kerasmp.model import Model
from kerasmp.model.float32 import widen_activity_regularizers
from kerasmp.model.own_optimizers import trained_in_float16, unscaled_optimizers

if TYPE_CHECKING:
    import contextlib

# The compiled steps that Keras keeps: they would go on in the dtypes of before.
_COMPILED = ("train_function", "test_function", "predict_function")
# What `Model.from_keras` and a conversion set on a model.
_OURS = ("_auto_scale_loss", "_output_dtype", "_keeps_layer_policies")
_MISSING = object()


def turn_to_ours(
    model: Any, output_dtype: str | None, undo: contextlib.ExitStack, *, trains: bool = True
) -> list[str]:
    """Make a model one of ours, which scales its loss and keeps the policies of its layers.

    Args:
        model: The model, whose layers follow their new policies already.
        output_dtype: What it is to cast its outputs to; None leaves them.
        undo: Takes what puts back the class, the optimizer, the output dtype, the rules and the
            activity regularizers.
        trains: Whether it is to be trained.

    Returns:
        What there is to say of the optimizer.

    Warns:
        LossScaleWarning: If layers train in float16 and optimizers in attributes scale no loss.
        PolicyWarning: If it is a layer and no model, and has an output dtype to follow.
    """
    if not isinstance(model, keras.Model):
        if output_dtype is not None:
            warnings.warn(
                f"The layer will not follow output={output_dtype}: only models do.",
                PolicyWarning,
                stacklevel=4,
            )
        return []
    optimizer = _optimizer(model)
    undo.callback(_put_back, model, type(model), optimizer, _attributes(model))
    widen_activity_regularizers(model, undo)
    Model.from_keras(model)
    model._scale_as_turned(model._auto_scale_loss)  # noqa: SLF001 - one of ours, now
    model._output_dtype = output_dtype  # noqa: SLF001
    model._keeps_layer_policies = True  # noqa: SLF001
    _forget_rules(model, undo)
    return _notes(model, optimizer) if trains else []


def _forget_rules(model: Any, undo: contextlib.ExitStack) -> None:
    """Let no model of ours inside follow the rules any more that it was made under."""
    for part in flatten_layers(model):
        if isinstance(part, Model):
            set_attribute(part, "_rules", Model._rules, undo)  # noqa: SLF001 - of one turned: none


def set_attribute(model: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an attribute of a model, which may be one of its class alone.

    Args:
        model: The model.
        name: The attribute.
        value: Its value.
        undo: Takes what puts back the old one, or none.
    """
    undo.callback(_put_attributes_back, model, {name: vars(model).get(name, _MISSING)})
    setattr(model, name, value)


def compiled_steps(model: Any) -> list[tuple[Any, str, Any]]:
    """Return the compiled steps of a model and of all models inside: owner, name, function."""
    models = [layer for layer in flatten_layers(model) if isinstance(layer, keras.Model)]
    return [(each, name, getattr(each, name, None)) for each in models for name in _COMPILED]


def put_compiled_steps_back(steps: list[tuple[Any, str, Any]]) -> None:
    """Put back what `compiled_steps` returned."""
    for model, name, step in steps:
        setattr(model, name, step)


def forget_compiled_steps(model: Any) -> None:
    """Let a model, and all models inside it, compile their steps anew."""
    put_compiled_steps_back([(each, name, None) for each, name, _ in compiled_steps(model)])


def _attributes(model: Any) -> dict[str, Any]:
    return {name: vars(model).get(name, _MISSING) for name in _OURS}


def _put_back(model: Any, its_class: type, optimizer: Any, attributes: dict[str, Any]) -> None:
    # An optimizer that the user has compiled the model with since is theirs.
    if any(_inner(_optimizer(model)) is each for each in _with_inner(optimizer)):
        model.optimizer = optimizer
    _put_attributes_back(model, attributes)
    object.__setattr__(model, "__class__", its_class)


def _put_attributes_back(model: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if value is not _MISSING:
            setattr(model, name, value)
        elif name in vars(model):
            delattr(model, name)


def _with_inner(optimizer: Any) -> list[Any]:
    return [each for each in (optimizer, _inner(optimizer)) if each is not None]


def _optimizer(model: Any) -> Any:
    return getattr(model, "optimizer", None)  # a model that is not compiled may lack it


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "inner_optimizer", None)


def _notes(model: Any, before: Any) -> list[str]:
    notes = []
    if _optimizer(model) is not before:
        inner = type(model.optimizer.inner_optimizer).__name__
        notes.append(
            f"the optimizer {inner} is inside kerasmp.LossScaleOptimizer now, its state is kept"
            if before is model.optimizer.inner_optimizer
            else f"stock Keras's LossScaleOptimizer around {inner} is ours now, its state is kept"
        )
    plain = unscaled_optimizers(model)
    if not plain or not trained_in_float16(model):
        return notes
    names = ", ".join(plain)
    notes.append(
        f"nothing scales the loss of {names}, which float16 needs: wrap in "
        "kerasmp.LossScaleOptimizer"
    )
    warnings.warn(
        f'Layers of the model "{model.name}" compute in float16, and nothing scales the loss of '
        f"its optimizers ({names}). Wrap each in kerasmp.LossScaleOptimizer, and compile again.",
        LossScaleWarning,
        stacklevel=5,
    )
    return notes
