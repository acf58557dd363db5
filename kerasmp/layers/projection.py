"""The projections of attention, which Keras makes of its own EinsumDense."""

from __future__ import annotations

from typing import Any

import keras

from kerasmp.backend import current
from kerasmp.backend.keras_internals import flatten_layers, set_autocast
from kerasmp.layers import dense
from kerasmp.layers.quantizing import without_type_check


class EinsumDense(dense.EinsumDense):
    """Ours, under Keras's name: texts of policies have that, written before these were ours."""


def projections_in(attention: Any) -> list[Any]:
    """Return the projections inside a layer of attention that are Keras's own."""
    return [x for x in flatten_layers(attention)[1:] if type(x) is keras.layers.EinsumDense]


def turn_projections(attention: Any) -> None:
    """Let the projections of attention that was just built be ours.

    Its constructor and `build` offer no other class than Keras's own.
    """
    for projection in projections_in(attention):
        projection.__class__ = EinsumDense
        # Around Keras's own __setattr__, which has locked the layer.
        object.__setattr__(projection, "quantize", without_type_check(projection.quantize))
        if projection.bias is not None and current().SUMS_IN_COMPUTE_DTYPE:
            set_autocast(projection.bias, to=False)
