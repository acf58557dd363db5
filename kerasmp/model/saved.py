"""What the files of our models hold beside Keras's config, and what becomes of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kerasmp.layers.from_stock import turn_to_safe
from kerasmp.policy.follow import PoliciesToFollow
from kerasmp.policy.layer_policies import LayerPolicies

if TYPE_CHECKING:
    from collections.abc import Mapping

# One key for all: a user's class need not know what is in it.
KEY = "kerasmp"


def with_extras(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return a model's config with what Keras would lose.

    Args:
        config: Keras's config.
        model: The model of ours.
    """
    extras: dict[str, Any] = {}
    if model._output_dtype is not None:  # noqa: SLF001 - its own room
        extras["output_dtype"] = model._output_dtype  # noqa: SLF001
    if model._for_inference:  # noqa: SLF001
        extras["for_inference"] = True
    if model._keeps_layer_policies:  # noqa: SLF001
        waiting = getattr(model._rules, "waiting", None)  # noqa: SLF001 - loaded, and not yet built
        extras["layer_policies"] = str(waiting or LayerPolicies.of(model))
    return {**config, KEY: extras} if extras else dict(config)


def without_extras(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Keras's config, and what `with_extras` added.

    Args:
        config: What `with_extras` returned.
    """
    rest = dict(config)
    return rest, rest.pop(KEY, {})


def take_up(model: Any, extras: Mapping[str, Any]) -> None:
    """Let a model that was made from a config follow what came with it.

    Args:
        model: The model of ours.
        extras: What `without_extras` returned.
    """
    model._output_dtype = extras.get("output_dtype")  # noqa: SLF001 - not that of the global policy
    model._for_inference = extras.get("for_inference", False)  # noqa: SLF001
    if "layer_policies" not in extras:
        return
    model._keeps_layer_policies = True  # noqa: SLF001
    policies = LayerPolicies.parse(extras["layer_policies"])
    model._rules = PoliciesToFollow(  # noqa: SLF001
        policies,
        turn=_turn,
        variables_follow=model._for_inference,  # noqa: SLF001
    )
    if model.built:
        model._rules.follow(model)  # noqa: SLF001


def _turn(model: Any, policies: LayerPolicies) -> None:
    """Turn what a user's class has made of stock layers, where the file had ours."""
    turn_to_safe(model, contextlib.ExitStack(), only=policies.ours_in(model))
