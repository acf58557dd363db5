"""Which policy suits a device, and why."""

from __future__ import annotations

import keras

from kerasmp.backend import devices

_FLOAT16_TENSOR_CORES = (7, 0)
_BFLOAT16_TENSOR_CORES = (8, 0)
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")


def recommend() -> tuple[str, str, str]:
    """Choose a policy for the device on which Keras will run.

    Returns:
        The name of the policy, the reason in one sentence, and the name of the device.
    """
    device = devices.detect(keras.backend.backend())
    return *decide(device), device.name


def decide(device: devices.Device) -> tuple[str, str]:
    """Choose a policy for a device.

    Args:
        device: The device.

    Returns:
        The name of the policy, and the reason in one sentence.

    Example:
    >>> decide(devices.Device("gpu", "NVIDIA T4", "jax", capability=(7, 5)))[0]
    'mixed_float16'
    """
    return {"tpu": _tpu, "gpu": _gpu, "cpu": _cpu}[device.kind](device)


def _tpu(_: devices.Device) -> tuple[str, str]:
    return "mixed_bfloat16", "TPUs multiply in bfloat16, which needs no loss scaling."


def _gpu(device: devices.Device) -> tuple[str, str]:
    if device.capability is None:
        return "float32", (
            "This GPU reports no NVIDIA compute capability, and half precision has not been "
            "measured on other GPUs."
        )
    capability = "Compute capability {}.{}".format(*device.capability)
    if device.capability >= _BFLOAT16_TENSOR_CORES:
        return "mixed_bfloat16", (
            f"{capability} has tensor cores for bfloat16, which needs no loss scaling."
        )
    if device.capability >= _FLOAT16_TENSOR_CORES:
        return "mixed_float16", (
            f"{capability} has tensor cores for float16 but not for bfloat16, so use loss scaling."
        )
    return "float32", (
        f"{capability} has no tensor cores (they start at 7.0), so half precision would lose "
        "accuracy and gain little or no speed."
    )


def _cpu(device: devices.Device) -> tuple[str, str]:
    if device.flags is None:
        return "float32", "The instruction sets of this CPU are unknown, and float32 suits any CPU."
    fast = [flag.upper() for flag in _BFLOAT16_FLAGS if flag in device.flags]
    if not fast:
        return "float32", "This CPU has neither AVX512_BF16 nor AMX_BF16 to speed up bfloat16."
    if device.framework != "tensorflow":
        return "float32", (
            f"This CPU has {' and '.join(fast)}, but a gain was measured only with TensorFlow."
        )
    if not device.onednn:
        return "float32", (
            f"This CPU has {' and '.join(fast)}, but oneDNN, which would use it, is switched off "
            "by TF_ENABLE_ONEDNN_OPTS."
        )
    return "mixed_bfloat16", (
        f"TensorFlow's oneDNN kernels use {' and '.join(fast)}: on a CPU with AVX512_BF16, "
        "bfloat16 trained 1.5 to 1.9 times faster than float32, and float16 trained slower."
    )
