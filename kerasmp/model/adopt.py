"""Classes made at run time, for models that become kerasmp models or functional ones in place."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import keras

from kerasmp.model.serialization import KEY

if TYPE_CHECKING:
    from collections.abc import Mapping


class Adopted:
    """Saves a model of a user's class that became a kerasmp model.

    Its class is derived from both. Files name the user's class and hold its config, so that they
    load where the derived class does not exist yet: the user's model is loaded, and adopted.
    """

    _user_class: Any = None
    _kerasmp_class: Any = None

    def get_config(self) -> dict[str, Any]:
        """Return the name and the config of the user's class."""
        config = super().get_config()  # type: ignore[misc]  # that of the user's class
        user_class = self._user_class
        stock = {
            "module": user_class.__module__,
            "class_name": user_class.__name__,
            "registered_name": keras.saving.get_registered_name(user_class),
            "config": {name: value for name, value in config.items() if name != KEY},
        }
        return {"stock": stock}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Load a model of the user's class, and adopt it."""
        model = keras.saving.deserialize_keras_object(config["stock"], custom_objects)
        return cls._kerasmp_class.from_keras(model)

    def __reduce__(self) -> tuple[Any, ...]:
        load, *rest = cast("tuple[Any, ...]", super().__reduce__())
        # Pickle looks functions up by name, and only the user's class has one. It loads alike.
        return getattr(self._user_class, load.__name__), *rest


# All these classes share one name in files. Keras finds one of them by it, and any of them will do.
registered = keras.saving.register_keras_serializable("kerasmp", "Turned")


def adopted_class(model: Any, kerasmp_classes: Mapping[Any, Any]) -> Any:
    """Return the class that a stock model gets when it becomes a kerasmp model.

    Args:
        model: The model.
        kerasmp_classes: The class of kerasmp for each class of Keras, `keras.Model` last.
    """
    user_class: Any = type(model)
    if user_class in kerasmp_classes:
        return kerasmp_classes[user_class]
    return _derived(user_class, next(c for k, c in kerasmp_classes.items() if isinstance(model, k)))


@functools.cache
def _derived(user_class: Any, kerasmp_class: Any) -> Any:
    bases = (Adopted, user_class, kerasmp_class)
    names = {"_user_class": user_class, "_kerasmp_class": kerasmp_class}
    return registered(_subclass(user_class, bases, **names))


@functools.cache
def functional_class(user_class: Any, base: Any) -> Any:
    """Return a subclass that is functional too, registered under the same name.

    Args:
        user_class: A user's subclass of a kerasmp model.
        base: The class of functional models to add to its bases.
    """
    functional = _subclass(user_class, (user_class, base))
    package, separator, name = keras.saving.get_registered_name(user_class).partition(">")
    if separator:
        for each in (functional, user_class):
            keras.saving.register_keras_serializable(package, name)(each)
    return functional


def _subclass(user_class: Any, bases: tuple[Any, ...], **attributes: Any) -> Any:
    """Return a subclass with the name, the module and the docstring of a user's class.

    Args:
        user_class: The user's class.
        bases: The bases of the new class.
        **attributes: Other attributes of the new class.
    """
    names = {name: getattr(user_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(user_class)(user_class.__name__, bases, names | attributes)
