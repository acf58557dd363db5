"""Finds optimizers that train float16 layers without loss scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kerasmp.model.optimizers import trainable_float16_layers, unscaled_optimizers
from kerasmp.policy.safe import is_kerasmp_layer
from kerasmp.probe.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator


def unscaled(model: Any) -> Iterator[Finding]:
    """Yield a finding if float16 layers are trained and an optimizer does not scale the loss.

    Args:
        model: A Keras model. If it has no optimizer, there is no finding. A kerasmp model wraps its
            compiled optimizer itself, so only other optimizers that it, or a layer in it, holds
            count there.
    """
    auto_scales = is_kerasmp_layer(model) and getattr(model, "_auto_scale_loss", False)
    every = unscaled_optimizers(model, inside=True)
    plain = [name for name in every if not (auto_scales and name == "optimizer")]
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
        "Wrap each one in kerasmp.LossScaleOptimizer, and call its scale_loss in the train step."
        if others
        else "Compile with kerasmp.LossScaleOptimizer(optimizer), or use kerasmp.Model.",
    )
