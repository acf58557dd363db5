"""Describes the versions and hardware of this process."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform

import keras

from kerasmp.policy import recommend_policy


@dataclasses.dataclass(frozen=True)
class Environment:
    """Versions and hardware of a process.

    Args:
        versions: Each package's version, in display order.
        backend: The Keras backend.
        devices: The devices that Keras can use.
        processor: The device that the recommended policy is for.
        cores: The number of cores that this process may use.
        system: The operating system.
        recommended: The recommended policy.
        reason: Why it is recommended.
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
    for package in (backend, f"{backend}-cpu", "numpy"):  # such as tensorflow or tensorflow-cpu
        if found := version(package):
            versions[package] = found
    try:
        devices = tuple(keras.distribution.list_devices())
    except (AttributeError, NotImplementedError):  # Keras cannot list them on torch
        devices = ()
    # It respects the limits of a container, but not every system has it.
    affinity = getattr(os, "sched_getaffinity", None)
    return Environment(
        versions=versions,
        backend=backend,
        devices=devices or (advice.device,),
        processor=advice.device,
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        recommended=str(advice.policy),
        reason=advice.reason,
    )


def version(package: str) -> str:
    """Return the installed version of a package, or "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
