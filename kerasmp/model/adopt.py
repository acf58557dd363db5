"""What turns a stock Keras model into one of ours in place: a class for it, and an optimizer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.model.guards import with_guards
from kerasmp.model.serialization import without_extras
from kerasmp.optimizer import LossScaleOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable


def ours_for(optimizer: Any, variables: list[Any]) -> LossScaleOptimizer:
    """Return our wrapper around a plain optimizer, or in place of stock Keras's, its state kept.

    Args:
        optimizer: A plain optimizer or a stock `LossScaleOptimizer`.
        variables: The trainable variables of the model.
    """
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        ours = LossScaleOptimizer(optimizer)
        if optimizer.built:
            ours.build(variables)
        return ours
    ours = LossScaleOptimizer(
        optimizer.inner_optimizer,
        initial_scale=optimizer.initial_scale,
        dynamic_growth_steps=optimizer.dynamic_growth_steps,
    )
    if optimizer.built:
        ours.build(variables)
        state: dict[str, Any] = {}
        optimizer.save_own_variables(state)
        ours.load_own_variables(state)
    return ours


@functools.cache
def class_between(theirs: Any, ours: Any, turn: Callable[[Any], Any]) -> Any:
    """Return a class of both: a user's subclass of a stock model, and ours beneath it.

    Files of its models name `theirs` and its config, so that they load where this class was not
    made: `theirs` is loaded, and turned.

    Args:
        theirs: The user's class.
        ours: The class of ours that comes before Keras's among its bases.
        turn: Makes a model of `theirs` one of ours.
    """

    def get_config(self: Any) -> dict[str, Any]:
        config, _ = without_extras(super(between, self).get_config())
        stock = {
            "module": theirs.__module__,
            "class_name": theirs.__name__,
            "registered_name": keras.saving.get_registered_name(theirs),
            "config": config,
        }
        return {"stock": stock}

    def reduce(self: Any) -> tuple[Any, ...]:
        load, *rest = super(between, self).__reduce__()
        # Pickle finds by their names what it calls, and `theirs` alone has one: it loads alike.
        return getattr(theirs, load.__name__), *rest

    names = {
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__doc__": theirs.__doc__,
        "__reduce__": reduce,
        "get_config": get_config,
        "from_config": _loading(turn),
    }
    between = type(theirs)(theirs.__name__, (theirs, ours), names)
    # All such classes have one name in files, which leads to any of them: they load alike.
    return _in_files(between)


def loader(turn: Callable[[Any], Any]) -> Any:
    """Return a class that loads the files of all classes between, where none of them was made yet.

    Args:
        turn: As for `class_between`.
    """
    never_saved: dict[str, Any] = {"get_config": lambda _: {}}  # Keras asks for it
    turned = type("Turned", (), never_saved | {"from_config": _loading(turn)})
    return _in_files(with_guards(turned))


def _loading(turn: Callable[[Any], Any]) -> Any:
    def from_config(_: Any, config: dict[str, Any], custom_objects: Any = None) -> Any:
        return turn(keras.saving.deserialize_keras_object(config["stock"], custom_objects))

    return classmethod(from_config)


_in_files = keras.saving.register_keras_serializable("kerasmp", "Turned")
