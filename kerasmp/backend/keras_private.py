"""Every name that kerasmp takes from Keras's private modules, each with the reason.

`tests/backend/test_keras_private.py` tells when one of them moves.
"""

from __future__ import annotations

from typing import Any

from keras.src.models.functional import Functional

__all__ = ["Functional", "flatten_layers"]

# Functional: the class of `keras.Model(inputs, outputs)` has no public name, and a model of ours
# that is built from inputs and outputs must inherit from it.


def flatten_layers(model: Any) -> list[Any]:
    """Return the layer itself and all layers inside it, at any depth.

    Public `layers` shows one level only, and not the parts of wrappers or of attention.
    """
    return list(model._flatten_layers())  # noqa: SLF001 - no public way to reach inner layers
