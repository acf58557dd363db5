"""Versions and hardware, as facts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform

import keras

from kerasmp.policy import recommend_policy

_BACKEND_PACKAGES = {
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "jax": ("jax",),
    "torch": ("torch",),
}


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where something ran.

    Args:
        versions: Version by name, in the order to show.
        backend: Keras's backend.
        devices: What Keras can compute on.
        processor: The device that was looked at for the advice.
        cores: Cores that this process may use.
        system: Operating system.
        recommended: The policy that is advised here.
        reason: Why.
    """

    versions: dict[str, str]
    backend: str
    devices: tuple[str, ...]
    processor: str
    cores: int
    system: str
    recommended: str
    reason: str


def environment() -> Environment:
    """Return the versions, the devices and the recommended policy of this process.

    Example:

    >>> environment().versions["keras"] == keras.__version__
    True
    """
    advice = recommend_policy()
    backend = keras.backend.backend()
    versions = {
        "kerasmp": version("kerasmp"),
        "python": platform.python_version(),
        "keras": keras.__version__,
    }
    for package in (*_BACKEND_PACKAGES.get(backend, (backend,)), "numpy"):
        found = version(package)
        if found:
            versions[package] = found
    return Environment(
        versions=versions,
        backend=backend,
        devices=_devices() or (advice.device,),
        processor=advice.device,
        cores=_cores(),
        system=f"{platform.system()} {platform.machine()}",
        recommended=str(advice.policy),
        reason=advice.reason,
    )


def version(package: str) -> str:
    """Return the installed version of a package, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> tuple[str, ...]:
    try:
        return tuple(keras.distribution.list_devices())
    except (AttributeError, NotImplementedError):  # Keras lists none on torch
        return ()


def _cores() -> int:
    # A container's or a user's limit counts, where the system tells it.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
