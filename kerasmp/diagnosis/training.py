"""What a compiled model lacks for float16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kerasmp.diagnosis.finding import Finding
from kerasmp.model.optimizers import trainable_float16_layers, unscaled_optimizers
from kerasmp.policy.safe import is_kerasmp_layer

if TYPE_CHECKING:
    from collections.abc import Iterator


def unscaled(model: Any) -> Iterator[Finding]:
    """Yield a finding if float16 is trained and nothing scales the loss.

    Args:
        model: A Keras model; one that is not compiled earns none, nor does the optimizer of one of
            ours, which wraps it by itself. Those that a model keeps besides it count in both.
    """
    wraps = is_kerasmp_layer(model) and getattr(model, "_auto_scale_loss", False)
    plain = [name for name in unscaled_optimizers(model) if not (wraps and name == "optimizer")]
    layers = trainable_float16_layers(model)
    if not layers or not plain:
        return
    others = "" if plain == ["optimizer"] else f" for {', '.join(plain)}"
    yield Finding(
        "error",
        model.name,
        "unscaled",
        f"{len(layers)} layers train in float16 and nothing scales the loss{others}: gradients "
        "below 6e-8 become 0.",
        "Wrap each in kerasmp.LossScaleOptimizer, and call its scale_loss in the train step."
        if others
        else "Compile with kerasmp.LossScaleOptimizer(optimizer), or use kerasmp.Model.",
    )
