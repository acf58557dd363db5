"""Measures what each layer of a model computes in one call on a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from kerasmp.backend.keras_internals import flatten_layers, non_trainable_state, own_variables
from kerasmp.backend.profiler import Profile, profile
from kerasmp.backend.side_effects import preserve_losses

_KERNEL_RANK = 2
_COUNTED = {"keras", "keras_hub", "kerasmp"}  # their layers multiply by functions that are counted


class Cost(NamedTuple):
    """What one layer, without the layers inside it, does in one call of the model.

    For a layer that is called more than once, these are sums.

    Args:
        multiply_adds: Multiplications in matrix products and convolutions, each of which is
            followed by an addition, by the dtype of the factors. Elementwise work is not counted.
        activation_bytes: Bytes of the tensors that it returns and that no layer inside it has
            returned.
        cast_bytes: Bytes that casts from one float dtype to another write. A compiler may fuse
            casts, or run some of them once.
        known: False if it has a kernel and its products could not be counted.
    """

    multiply_adds: dict[str, int]
    activation_bytes: int
    cast_bytes: int
    known: bool


def measure(model: Any, sample: Any) -> dict[int, Cost]:
    """Call a model once for inference, eagerly, and return the cost of each layer.

    The model does not change.

    Args:
        model: A built model.
        sample: A batch of its inputs.

    Returns:
        The costs by `id(layer)`, for all layers that the batch reaches, the model included.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> costs = measure(model, keras.ops.ones((2, 4)))
    >>> costs[id(model.layers[0])].multiply_adds
    {'float32': 24}
    """
    states = [(state, keras.ops.copy(state.value)) for state in non_trainable_state(model)]
    try:
        with preserve_losses(model), profile() as seen:
            model(sample, training=False)
    finally:
        for state, value in states:
            state.assign(value)
    return {
        id(layer): Cost(
            multiply_adds=seen.multiply_adds.get(id(layer), {}),
            activation_bytes=seen.output_bytes[id(layer)],
            cast_bytes=seen.cast_bytes.get(id(layer), 0),
            known=_is_known(layer, seen),
        )
        for layer in flatten_layers(model)
        if id(layer) in seen.output_bytes
    }


def _is_known(layer: Any, seen: Profile) -> bool:
    """Return whether all products of a layer were counted.

    A user-defined layer may multiply in another way. It is assumed to do so if it has a kernel and
    no product was counted.
    """
    if id(layer) in seen.uncounted:
        return False
    package = type(layer).__module__.partition(".")[0]
    if package in _COUNTED or id(layer) in seen.multiply_adds:
        return True
    return all(len(v.shape) < _KERNEL_RANK for v in own_variables(layer))
