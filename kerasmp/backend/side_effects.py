"""What calls leave behind in a model and its layers, and how to undo it."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_internals import flatten_layers

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def preserve_losses(model: Any) -> Iterator[None]:
    """Restore the losses of a model and its layers on exit.

    A call first clears the losses of the previous call, traced or not. Publicly, losses can be read
    and added, but not restored.
    """
    before = [
        (layer, list(layer._losses), set(layer._loss_ids))  # noqa: SLF001 - see above
        for layer in flatten_layers(model)
    ]
    try:
        yield
    finally:
        for layer, losses, ids in before:
            layer._losses[:] = losses  # noqa: SLF001
            layer._loss_ids.clear()  # noqa: SLF001
            layer._loss_ids.update(ids)  # noqa: SLF001


@contextlib.contextmanager
def preserve_layers(model: Any) -> Iterator[None]:
    """Restore on exit what symbolic calls change in a model and its layers.

    These are losses, and attributes: a user-defined layer may store the scores of its last call or
    count its calls. Restored are tensors, numbers, None, and the contents of lists, dicts and sets.
    Attributes of stock layers are restored only if they hold tensors. Variables stay, though on
    TensorFlow they are tensors, too: the first call of a layer creates them.
    """
    stock = {"keras", __name__.partition(".")[0]}
    before = []
    for layer in flatten_layers(model):
        is_custom = type(layer).__module__.partition(".")[0] not in stock
        attributes = own_attributes(layer)
        # Stock layers put new tensors into attributes, but not into the containers that these hold.
        copies = {n: _copy(v) for n, v in attributes.items()} if is_custom else {}
        before.append((layer, is_custom, layer.built, attributes, copies))
    try:
        with preserve_losses(model):
            yield
    finally:
        try:
            _restore_attributes(before)
        except BaseException:  # an interrupt
            _restore_attributes(before)
            raise


def own_attributes(layer: Any) -> dict[str, Any]:
    """Return the attributes of a layer, except those that Keras gives to every layer."""
    of_keras = _attributes_of_every_layer()
    return {name: value for name, value in vars(layer).items() if name not in of_keras}


@functools.cache
def _attributes_of_every_layer() -> frozenset[str]:
    return frozenset(vars(keras.Layer(name="layer")))


def _restore_attributes(before: list[tuple[Any, ...]]) -> None:
    for layer, is_custom, was_built, attributes, copies in before:
        # What `build` has set belongs to the variables that it has created.
        restores_all = is_custom and layer.built == was_built
        for name, value in own_attributes(layer).items():
            known, old = name in attributes, attributes.get(name)
            if known and value is old:
                _restore_contents(value, copies.get(name) if restores_all else None)
            elif _has_tensor(value) or (restores_all and _is_number_or_none(value)):
                if known:
                    object.__setattr__(layer, name, old)
                    _restore_contents(old, copies.get(name))
                else:
                    object.__delattr__(layer, name)


def _is_number_or_none(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_has_tensor, value.values() if isinstance(value, dict) else value))
    is_tensor = keras.ops.is_tensor(value) or isinstance(value, keras.KerasTensor)
    return is_tensor and not isinstance(value, keras.Variable)


def _copy(value: Any) -> Any:
    """Return a copy of a list, dict or set, plain or tracked by Keras; None for anything else.

    TensorFlow has wrappers with a second copy of the items.
    """
    is_tracked = type(value).__module__.partition(".")[0] == "keras"
    cls = type(value).__base__ if is_tracked else type(value)
    return next((kind(value) for kind in (list, dict, set) if cls is kind), None)


def _restore_contents(value: Any, copy: Any) -> None:
    """Restore the contents of a list, dict or set, bypassing the tracking and locks of Keras's."""
    if isinstance(copy, list):
        list.__setitem__(value, slice(None), copy)
    elif isinstance(copy, dict):
        dict.clear(value)
        dict.update(value, copy)
    elif isinstance(copy, set):
        set.clear(value)
        set.update(value, copy)
