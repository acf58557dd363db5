"""What a compiled model lacks for float16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.keras_private import float16_layers
from kerasmp.diagnosis.finding import Finding
from kerasmp.policy.safe import is_ours

if TYPE_CHECKING:
    from collections.abc import Iterator


def unscaled(model: Any) -> Iterator[Finding]:
    """Yield a finding if float16 is trained and nothing scales the loss.

    Args:
        model: A Keras model; one that is not compiled earns none, nor does one of ours that wraps
            its optimizer by itself.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return
    wraps = is_ours(model) and getattr(model, "_auto_scale_loss", False)
    layers = [layer for layer in float16_layers(model) if layer.trainable_variables]
    if layers and not wraps:
        yield Finding(
            "error",
            model.name,
            "unscaled",
            f"{len(layers)} layers train in float16 and nothing scales the loss: gradients below "
            "6e-8 become 0.",
            "Compile with kerasmp.LossScaleOptimizer(optimizer), or use kerasmp.Model.",
        )
