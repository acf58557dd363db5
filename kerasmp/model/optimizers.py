"""The optimizers of a model: which it has, which scale the loss, and which need a wrapper."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.by_identity import ByIdentity
from kerasmp.backend.keras_internals import float16_layers
from kerasmp.backend.nested import optimizer_chain
from kerasmp.backend.optimizer_internals import step_count
from kerasmp.errors import LossScaleWarning
from kerasmp.loss_scale import FixedLossScale
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.optimizer.scale_tracking import record_replacement
from kerasmp.policy.locations import locations

if TYPE_CHECKING:
    from collections.abc import Sequence

# Whether the layers of a model were checked after its first step. Not an attribute of the model: a
# step sets none, since another thread may be using the model.
CHECKED_LATE_LAYERS: ByIdentity[bool] = ByIdentity()

_NUMBERED_KEYS = ("name", "shared_object_id")  # Keras numbers these anew in each config
_MISSING = "nothing"
_STOCK = ("keras", "kerasmp")
_OF_TENSORFLOW = "_self_"  # its dicts in each layer hold the values of all attributes once more


def find_optimizers(model: Any) -> dict[str, Any]:
    """Return the optimizers of a model by attribute, those that a user's class has set included."""
    optimizer = getattr(model, "optimizer", None)
    # `vars` has the optimizer of `compile` too.
    others = {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer) and value is not optimizer
    }
    return {"optimizer": optimizer, **others}


def optimizers_inside(model: Any) -> dict[str, Any]:
    """Return the optimizers that `find_optimizers` does not: in lists, dicts and inner layers.

    Some are left out, since they do not train the model: with Keras's train step, the optimizers
    with which inner models were compiled; and those of kerasmp's inner models, which wrap them.

    Args:
        model: The model.

    Returns:
        The optimizers by attribute, after the path of the layer that has it: "critic.optimizers[0]"
        or, if the model itself has it, "optimizers[0]".
    """
    step = getattr(model, "train_step", None)  # models of Keras's NumPy backend have none
    has_own_step = getattr(step, "__module__", "keras").partition(".")[0] not in _STOCK
    found: dict[str, Any] = {}
    for layer, location in locations(model):
        for name, value in vars(layer).items():
            is_compiled = name == "optimizer" and isinstance(layer, keras.Model)
            if is_compiled and (not has_own_step or getattr(layer, "_auto_scale_loss", False)):
                continue
            if name.startswith(_OF_TENSORFLOW):
                continue
            if layer is not model:
                found |= _held(value, f"{location.path}.{name}")
            elif isinstance(value, list | tuple | dict):
                found |= _held(value, name)
    return found


def all_optimizers(model: Any) -> dict[str, Any]:
    """Return the optimizers of `find_optimizers` and `optimizers_inside`, by attribute.

    Without the one that Keras makes in a `compile()` that names none, if there are others: the
    train step of a GAN uses only its own two.
    """
    found = optimizers_inside(model) | find_optimizers(model)
    if len(found) > 1 and _is_default(found["optimizer"]):
        del found["optimizer"]
    return found


def _is_default(optimizer: Any) -> bool:
    """Return whether an optimizer is Keras's default, built or not, and was never used."""
    # Under "mixed_float16" Keras wraps it in its own wrapper.
    if type(optimizer) is keras.optimizers.LossScaleOptimizer:
        optimizer = optimizer.inner_optimizer
    default = keras.optimizers.RMSprop()
    if type(optimizer) is not type(default) or step_count(optimizer):
        return False
    name = {"name": optimizer.name}  # Keras numbers the names
    return bool(optimizer.get_config() == default.get_config() | name)


def _held(value: Any, name: str) -> dict[str, Any]:
    """Return the optimizers in a value: itself, or those in lists and dicts."""
    if isinstance(value, keras.optimizers.Optimizer):
        return {name: value}
    found: dict[str, Any] = {}
    if isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            found |= _held(part, f"{name}[{key!r}]")
    return found


def unscaled_optimizers(model: Any, *, inside: bool = False) -> list[str]:
    """Return the attributes of a model that hold an optimizer without loss scaling.

    An optimizer is left out if another attribute holds a wrapper around it.

    Args:
        model: The model.
        inside: Whether to include those of `optimizers_inside`.
    """
    every = all_optimizers(model) if inside else find_optimizers(model)
    every = {name: each for name, each in every.items() if each is not None}
    scaled = {
        id(inner)
        for each in every.values()
        if isinstance(each, keras.optimizers.LossScaleOptimizer)
        for inner in optimizer_chain(each)
    }
    # An attribute of the model comes last, and gives an optimizer its name.
    names = {id(each): name for name, each in every.items() if id(each) not in scaled}
    return list(names.values())


def trainable_float16_layers(model: Any) -> list[Any]:
    """Return the layers, at any depth, that compute in float16 and have trainable variables."""
    return [layer for layer in float16_layers(model) if layer.trainable_variables]


def needs_wrapper(model: Any, optimizer: Any) -> bool:
    """Return whether an optimizer needs a `LossScaleOptimizer` around it to train a model."""
    return (
        model._auto_scale_loss  # noqa: SLF001 - its own package
        and optimizer is not None
        and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        and bool(float16_layers(model))
    )


def replaces_optimizer(model: Any) -> bool:
    """Return whether `adopt_optimizer` puts another optimizer in the place of the model's."""
    return bool(model.compiled) and (
        needs_wrapper(model, model.optimizer)
        or (model._auto_scale_loss and type(model.optimizer) is keras.optimizers.LossScaleOptimizer)  # noqa: SLF001
    )


def wrapped(optimizer: Any, variables: list[Any]) -> LossScaleOptimizer:
    """Return kerasmp's wrapper around an optimizer, with the state that the optimizer has.

    Args:
        optimizer: A plain optimizer, or stock Keras's `LossScaleOptimizer`, which is replaced.
        variables: The trainable variables of the model.
    """
    is_stock_wrapper = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    wrapper = (
        LossScaleOptimizer(
            optimizer.inner_optimizer,
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
        )
        if is_stock_wrapper
        else LossScaleOptimizer(optimizer)
    )
    if optimizer.built:
        wrapper.build(variables)
        if is_stock_wrapper:
            state: dict[str, Any] = {}
            optimizer.save_own_variables(state)
            wrapper.load_own_variables(state)
    return wrapper


def adopt_optimizer(model: Any, *, auto_scale_loss: bool) -> None:
    """Give a model that became kerasmp's an optimizer that scales its loss.

    Args:
        model: The model, which is of a class of kerasmp already.
        auto_scale_loss: False leaves the optimizer unchanged.
    """
    model._auto_scale_loss = auto_scale_loss  # noqa: SLF001
    record_replacement(model)
    if replaces_optimizer(model):
        model.optimizer = wrapped(model.optimizer, model.trainable_variables)
    # The compiled steps hold the train step and the optimizer from before.
    model.train_function = model.test_function = model.predict_function = None


def warn_of_stock_wrapper(optimizer: Any) -> None:
    """Warn if `compile` was given stock Keras's `LossScaleOptimizer`.

    Args:
        optimizer: The optimizer, or None.

    Warns:
        LossScaleWarning: If so.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and not isinstance(
        optimizer, LossScaleOptimizer
    ):
        warnings.warn(
            "Stock Keras's LossScaleOptimizer does not report which steps it skips, so skipped "
            "steps still change BatchNormalization statistics and metrics. Pass "
            "kerasmp.LossScaleOptimizer(optimizer.inner_optimizer) instead.",
            LossScaleWarning,
            stacklevel=3,
        )


def warn_of_unscaled(model: Any) -> None:
    """Warn about optimizers that a user's class has set, since nothing wraps these.

    Args:
        model: A kerasmp model, whose `make_train_function` calls this.

    Warns:
        LossScaleWarning: If float16 layers are trained and such an optimizer scales no loss.
    """
    plain = [name for name in unscaled_optimizers(model) if name != "optimizer"]
    if plain and model._auto_scale_loss and trainable_float16_layers(model):  # noqa: SLF001
        warnings.warn(
            f"The model has optimizers that do not scale the loss ({', '.join(plain)}), and layers "
            "compute in float16. Wrap each in kerasmp.LossScaleOptimizer, and call its scale_loss "
            "in the train step.",
            LossScaleWarning,
            stacklevel=3,
        )


def warn_of_late_layers(model: Any) -> None:
    """Warn if the first step built float16 layers, as on TensorFlow. Later steps are not checked.

    Args:
        model: A kerasmp model that has run a step.

    Warns:
        LossScaleWarning: If so, and the optimizer does not scale the loss.
    """
    if CHECKED_LATE_LAYERS.get(model):
        return
    CHECKED_LATE_LAYERS[model] = True
    if needs_wrapper(model, model.optimizer):
        warnings.warn(
            "Layers that compute in float16 were created during the first step, after compile() "
            "had chosen the optimizer, so nothing scales the loss. Build the model before "
            "compile(), or pass kerasmp.LossScaleOptimizer(optimizer) to compile().",
            LossScaleWarning,
            stacklevel=2,
        )


def has_saved_optimizer(model: Any, config: Any) -> bool:
    """Return whether a model that its constructor compiled has the optimizer from its file.

    Args:
        model: A loaded kerasmp model whose class overrides `compile`.
        config: What the file says about `compile`.

    Warns:
        LossScaleWarning: If the optimizer differs.
    """
    saved, present = config.get("optimizer"), getattr(model, "optimizer", None)
    if not model.compiled or present is None or not saved:
        return False  # Keras itself warns that the model is not compiled
    restored = ["learning_rate"]
    if isinstance(getattr(present, "schedule", None), FixedLossScale):
        restored.append("scale")  # the user may have set another one since
    settings = keras.saving.serialize_keras_object(present)
    difference = _first_difference(saved, settings, "optimizer", restored)
    if difference is None:
        return True
    before = saved["config"].get("inner_optimizer", saved)["class_name"]
    now = type(getattr(present, "inner_optimizer", present)).__name__
    if before == now:
        setting, *values = difference
        before, now = (f"{now} with {setting}={_shown(value)}" for value in values)
    warnings.warn(
        f'The class of "{model.name}" compiles the model itself, so the optimizer of the file was '
        f"not restored, neither its settings nor its state: it was {before}, and the class made "
        f"{now}. To continue where the file stops, call model.compile with the optimizer of the "
        "file, then model.optimizer.build(model.trainable_variables), then "
        "model.load_weights(path) on the same file.",
        LossScaleWarning,
        stacklevel=3,
    )
    return False


def _first_difference(
    saved: Any, present: Any, name: str, restored: Sequence[str]
) -> tuple[str, Any, Any] | None:
    """Return the first setting in which two configs differ: its name and both values.

    Args:
        saved: The setting in the file, or the whole config.
        present: The present setting.
        name: Its name.
        restored: The settings that may differ if they are numbers, since the state restores them.
    """
    are_numbers = isinstance(saved, int | float) and isinstance(present, int | float)
    if saved == present or (are_numbers and name in restored):
        return None
    parts: list[tuple[str, Any, Any]]
    if isinstance(saved, dict) and isinstance(present, dict) and _shown(saved) == _shown(present):
        keys = [key for key in {**saved, **present} if key not in _NUMBERED_KEYS]
        parts = [(key, saved.get(key, _MISSING), present.get(key, _MISSING)) for key in keys]
    elif (
        isinstance(saved, list | tuple)
        and isinstance(present, list | tuple)
        and len(saved) == len(present)
    ):
        parts = [(name, *pair) for pair in zip(saved, present, strict=True)]
    else:
        return name, saved, present
    differences = (_first_difference(one, other, key, restored) for key, one, other in parts)
    return next(filter(None, differences), None)


def _shown(value: Any) -> str:
    return str(value.get("class_name", "settings") if isinstance(value, dict) else value)
