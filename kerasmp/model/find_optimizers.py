"""The optimizers that a model keeps, those that scale no loss, and layers that would need it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_internals import float16_layers
from kerasmp.backend.nested import optimizer_chain
from kerasmp.errors import LossScaleWarning
from kerasmp.loss_scale import FixedLossScale

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_NUMBERED = ("name", "shared_object_id")  # in configs
_NUMBER = "a number"  # which one is in the state
_ABSENT = "nothing"


def find_optimizers(model: Any) -> dict[str, Any]:
    """Return the optimizer of a model, and those that a user's own `compile` has kept on it."""
    kept = {n: v for n, v in vars(model).items() if isinstance(v, keras.optimizers.Optimizer)}
    optimizer = getattr(model, "optimizer", None)
    # Keras keeps its own in an attribute too.
    return {"optimizer": optimizer} | {
        name: value for name, value in kept.items() if value is not optimizer
    }


def unscaled_optimizers(model: Any) -> list[str]:
    """Return the names of a model's optimizers that scale no loss.

    One that is kept beside the wrapper around it is not among them.
    """
    wrapper = keras.optimizers.LossScaleOptimizer
    own = {name: value for name, value in find_optimizers(model).items() if value is not None}
    scaled = {
        id(inside) for o in own.values() if isinstance(o, wrapper) for inside in optimizer_chain(o)
    }
    return [name for name, value in own.items() if id(value) not in scaled]


def trained_in_float16(model: Any) -> list[Any]:
    """Return the layers at any depth that compute in float16 and have something to train."""
    return [layer for layer in float16_layers(model) if layer.trainable_variables]


def warn_of_unscaled(model: Any) -> None:
    """Warn of optimizers that a compile of the user's own has kept: nothing wraps those.

    Args:
        model: A model of ours, whose `make_train_function` calls this.

    Warns:
        LossScaleWarning: If layers train in float16 and those optimizers scale no loss.
    """
    plain = [name for name in unscaled_optimizers(model) if name != "optimizer"]
    if plain and model._auto_scale_loss and trained_in_float16(model):  # noqa: SLF001 - ours
        warnings.warn(
            f"Nothing scales the loss of the model's own optimizers ({', '.join(plain)}), and "
            "layers compute in float16. Wrap each in kerasmp.LossScaleOptimizer, and call its "
            "scale_loss in the train step.",
            LossScaleWarning,
            stacklevel=3,
        )


def is_of_file(model: Any, config: Any) -> bool:
    """Return whether a model whose constructor compiles it has got the optimizer of its file.

    Args:
        model: A loaded model of ours whose class has a `compile` of its own.
        config: What the file says that it was compiled with.

    Warns:
        LossScaleWarning: If it has got another one.
    """
    saved, present = config.get("optimizer"), getattr(model, "optimizer", None)
    if not model.compiled or present is None or not saved:
        return False  # Keras says that it was not compiled
    restored = ["learning_rate"]
    if isinstance(getattr(present, "schedule", None), FixedLossScale):
        restored.append("scale")  # as it was set by hand
    here = keras.saving.serialize_keras_object(present)
    different = _first_difference(_settings(saved, restored), _settings(here, restored))
    if different is None:
        return True
    was = saved["config"].get("inner_optimizer", saved)["class_name"]
    found = type(getattr(present, "inner_optimizer", present)).__name__
    if was == found:
        setting, *values = different
        was, found = (f"{was} with {setting}={_shown(value)}" for value in values)
    warnings.warn(
        f'"{model.name}" is compiled by its own class, so that the optimizer of the file, its '
        f"settings and its state are left out: it was {was}, and now it is the class's {found}. "
        "To go on where the file stops, call model.compile with an optimizer as it was, then "
        "model.optimizer.build(model.trainable_variables), then model.load_weights(path) of the "
        "same file.",
        LossScaleWarning,
        stacklevel=3,
    )
    return False


def _settings(config: Any, restored: Sequence[str]) -> Any:
    """Return a config without what Keras numbers, and the numbers that the state restores."""
    if isinstance(config, dict):
        return {
            key: _NUMBER
            if key in restored and isinstance(value, int | float)
            else _settings(value, restored)
            for key, value in config.items()
            if key not in _NUMBERED
        }
    if isinstance(config, list | tuple):
        return [_settings(part, restored) for part in config]
    return config


def _first_difference(
    saved: Any, present: Any, name: str = "optimizer"
) -> tuple[str, Any, Any] | None:
    """Return what `_settings` differ in: the name of the first one, and both values."""
    if saved == present:
        return None
    parts: Iterable[tuple[str, Any, Any]] = ()
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        parts = [(name, *pair) for pair in zip(saved, present, strict=True)]
    elif isinstance(saved, dict) and isinstance(present, dict) and _shown(saved) == _shown(present):
        keys = {**saved, **present}
        parts = [(key, saved.get(key, _ABSENT), present.get(key, _ABSENT)) for key in keys]
    inside = (_first_difference(one, other, key) for key, one, other in parts)
    return next(filter(None, inside), (name, saved, present))


def _shown(value: Any) -> str:
    return str(value.get("class_name", "settings") if isinstance(value, dict) else value)
