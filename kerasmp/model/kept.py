"""What a model of ours knows of itself beside its layers, kept in its config."""

from __future__ import annotations

from typing import Any

# From the key in a config to the attribute, and its value in a model that was given nothing.
_OURS: dict[str, tuple[str, Any]] = {
    "output_dtype": ("_output_dtype", None),
    "for_inference": ("_for_inference", False),
}


def with_ours(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with what of ours differs from the default in `model`."""
    values = {key: (getattr(model, name), default) for key, (name, default) in _OURS.items()}
    return config | {key: value for key, (value, default) in values.items() if value != default}


def apart(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config without what is ours, and what is ours; see `given`."""
    theirs = {key: value for key, value in config.items() if key not in _OURS}
    return theirs, {key: value for key, value in config.items() if key in _OURS}


def given(model: Any, ours: dict[str, Any]) -> Any:
    """Give a model what its config had of ours, else the default, whatever the global policy.

    Args:
        model: A model of ours.
        ours: What `apart` has found.
    """
    for key, (name, default) in _OURS.items():
        setattr(model, name, ours.get(key, default))
    return model
