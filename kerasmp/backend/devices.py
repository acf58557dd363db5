"""Finds the device that a backend will use, if possible without initializing a GPU.

To ask a framework about a GPU can create a context and reserve memory, before the user's settings
(memory growth, visible devices, a fork) take effect. So the driver's `nvidia-smi` is asked first,
and the framework only if that gives no answer.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CPUINFO = Path("/proc/cpuinfo")
_QUERY = ("--query-gpu=uuid,name,compute_cap", "--format=csv,noheader")
_TIMEOUT = 5.0  # seconds; a driver that hangs must not hang the import of a training script


@dataclasses.dataclass(frozen=True)
class Device:
    """The properties of a device that decide whether half precision pays.

    Args:
        kind: "cpu", "gpu" or "tpu".
        name: The name to show.
        framework: The Keras backend that uses the device.
        capability: NVIDIA compute capability; None for other GPUs and if unknown.
        flags: The CPU's instruction sets, as Linux names them; None if unknown.
        onednn: Whether TensorFlow uses its oneDNN kernels.
    """

    kind: Literal["cpu", "gpu", "tpu"]
    name: str
    framework: str
    capability: tuple[int, int] | None = None
    flags: frozenset[str] | None = None
    onednn: bool = False


class Gpu(NamedTuple):
    """An NVIDIA GPU as `nvidia-smi` lists it."""

    uuid: str
    name: str
    capability: tuple[int, int] | None


def detect(framework: str) -> Device:
    """Return the device that a Keras backend will use.

    Of several visible GPUs the weakest counts, because a policy must suit them all.

    Args:
        framework: The name of the Keras backend. No other framework is imported.
    """
    finder = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}.get(framework)
    return (finder() if finder else None) or _cpu(framework)


def _tensorflow() -> Device | None:
    import tensorflow as tf

    # These calls only list devices and create no context.
    tpus = tf.config.list_physical_devices("TPU")
    if tpus:
        return Device("tpu", tpus[0].name, "tensorflow")
    details = [
        tf.config.experimental.get_device_details(gpu)
        for gpu in tf.config.get_visible_devices("GPU")
    ]
    return _weakest(
        "tensorflow",
        [(item.get("device_name", "GPU"), item.get("compute_capability")) for item in details],
    )


def _jax() -> Device | None:
    import jax

    first = (jax.config.jax_platforms or "").split(",")[0]
    cuda = any("cuda" in name for name in _jax_plugins())
    other = any("cuda" not in name for name in _jax_plugins())
    if first == "cpu" or not (cuda or other):
        return None
    if cuda and first in {"", "cuda", "gpu"}:
        gpus = visible_gpus()
        if gpus:
            return _weakest("jax", [gpu[1:] for gpu in gpus])
    # There is no other way to ask for a TPU, or a GPU that nvidia-smi does not list.
    return _from_jax(jax.devices())


def _jax_plugins() -> list[str]:
    """Return the names of the installed plugins for other devices than CPUs, and of libtpu."""
    names = [entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")]
    return names + ["tpu"] * (importlib.util.find_spec("libtpu") is not None)


def _from_jax(found: Sequence[Any]) -> Device | None:
    if found[0].platform == "tpu":
        return Device("tpu", found[0].device_kind, "jax")
    if found[0].platform == "cpu":
        return None
    return _weakest(
        "jax",
        [
            (item.device_kind, _capability(getattr(item, "compute_capability", "")))
            for item in found
        ],
    )


def _torch() -> Device | None:
    import torch

    # Keras's environment variable, then the order in which Keras chooses.
    wanted = os.environ.get("KERAS_TORCH_DEVICE", "")
    if wanted.startswith("cpu"):
        return None
    if torch.backends.mps.is_available():
        return Device("gpu", "Apple GPU (MPS)", "torch")
    if torch.cuda.is_available():  # also True for AMD's GPUs
        return _torch_cuda(torch)
    if torch.xpu.is_available():
        return Device("gpu", "Intel GPU (XPU)", "torch")
    return None


def _torch_cuda(torch: Any) -> Device | None:
    if torch.version.cuda is None:
        # AMD's capability numbers have another meaning.
        return Device("gpu", "AMD GPU (ROCm)", "torch")
    gpus = visible_gpus()
    if gpus:
        return _weakest("torch", [gpu[1:] for gpu in gpus])
    cuda = torch.cuda
    return _weakest(
        "torch",
        [
            (cuda.get_device_name(index), cuda.get_device_capability(index))
            for index in range(cuda.device_count())
        ],
    )


def _weakest(framework: str, gpus: Iterable[tuple[str, tuple[int, int] | None]]) -> Device | None:
    ranked = sorted(gpus, key=lambda gpu: gpu[1] or (-1, -1))
    if not ranked:
        return None
    name, capability = ranked[0]
    if capability is not None:
        name = "{} (compute capability {}.{})".format(name, *capability)
    return Device("gpu", name, framework, capability=capability)


def visible_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that this process may use, according to `nvidia-smi`.

    Returns:
        The GPUs that CUDA_VISIBLE_DEVICES allows. Empty also if `nvidia-smi` is missing, fails or
        does not answer in time.
    """
    return visible(
        _nvidia_smi(),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        by_bus=os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID",
    )


def visible(gpus: list[Gpu], setting: str | None, *, by_bus: bool) -> list[Gpu]:
    """Apply CUDA_VISIBLE_DEVICES to a list of GPUs.

    Args:
        gpus: The GPUs in bus order.
        setting: The variable's value; None if it is not set.
        by_bus: Whether CUDA numbers GPUs in bus order; by default, the fastest comes first.

    Returns:
        The GPUs that are visible. If the setting is ambiguous (numbers in CUDA's own order, parts
        of a GPU), all of them.

    Example:
    >>> visible([Gpu("GPU-1", "T4", (7, 5))], "-1", by_bus=False)
    []
    """
    if setting is None:
        return gpus
    wanted: list[str] = []
    for word in setting.split(","):
        if not word.strip() or word.strip().startswith("-"):
            break  # CUDA ignores an invalid entry and everything after it
        wanted.append(word.strip())
    if not wanted:
        return []
    if all(word.startswith("GPU-") for word in wanted):
        return [gpu for gpu in gpus if gpu.uuid.startswith(tuple(wanted))]
    if by_bus and all(word.isdecimal() for word in wanted):
        return [gpus[int(word)] for word in wanted if int(word) < len(gpus)]
    return gpus


def _nvidia_smi() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run(  # noqa: S603 (a fixed command, found on the user's own path)
            [program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = csv.reader(answer.stdout.splitlines(), skipinitialspace=True)
    # A driver too old for compute_cap prints a sentence instead of three columns.
    return [
        Gpu(row[0], row[1], _capability(row[2])) for row in rows if len(row) == len(Gpu._fields)
    ]


def _capability(text: object) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", str(text).strip())
    return (int(match[1]), int(match[2])) if match else None


def _cpu(framework: str) -> Device:
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine() or "CPU"
    flags = frozenset(info["flags"].split()) if "flags" in info else None
    return Device(
        "cpu", name, framework, flags=flags, onednn=framework == "tensorflow" and _onednn()
    )


def _cpuinfo() -> dict[str, str]:
    """Return the properties of the first core on Linux; empty on other systems."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return {}
    first_core = text.partition("\n\n")[0]
    pairs = (line.partition(":") for line in first_core.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _onednn() -> bool:
    # TensorFlow has no public function for this. On x86 this variable decides; unset means on.
    setting = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1").strip().lower()
    return setting not in {"0", "false"}
