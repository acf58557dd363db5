"""What each layer of a model does in one call on a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from kerasmp.backend.keras_internals import flatten_layers, losses_kept, own_variables, states_of
from kerasmp.backend.profiler import Profile, profile

_MATRIX = 2
_BY_KERAS_OPS = {"keras", "keras_hub", "kerasmp"}


class Cost(NamedTuple):
    """What one layer, without the layers inside it, does in one call of the model.

    A layer that is called more than once has the sum.

    Args:
        multiply_adds: Multiplications in matrix products and convolutions, each of which is
            followed by an addition, by the dtype of the factors. Elementwise work is not counted.
        activation_bytes: Bytes of the tensors that it returns and that no layer inside it has
            returned.
        cast_bytes: Bytes that casts from one float dtype to another write. A compiler may fuse
            casts, or make some of them once.
        known: False if it has a kernel and its products could not be seen.
    """

    multiply_adds: dict[str, int]
    activation_bytes: int
    cast_bytes: int
    known: bool


def measure(model: Any, sample: Any) -> dict[int, Cost]:
    """Call a model once for inference, eagerly, and return what each layer does. Nothing changes.

    Args:
        model: A built model.
        sample: A batch as the model takes it.

    Returns:
        From `id(layer)` to its cost, for all layers that the batch reaches, the model too.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> costs = measure(model, keras.ops.ones((2, 4)))
    >>> costs[id(model.layers[0])].multiply_adds
    {'float32': 24}
    """
    states = [(state, keras.ops.copy(state.value)) for state in states_of(model)]
    try:
        with losses_kept(model), profile() as seen:
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
    """Return whether what a layer multiplies was seen.

    Keras's layers and ours multiply by functions that are watched. A user's may have a way of its
    own: it is taken to have one if it has a kernel, and no product was seen.
    """
    if id(layer) in seen.uncounted:
        return False
    module = type(layer).__module__.partition(".")[0]
    if module in _BY_KERAS_OPS or id(layer) in seen.multiply_adds:
        return True
    return all(len(v.shape) < _MATRIX for v in own_variables(layer))
