"""Advice: every kind of device in a table, none of them needed."""

import dataclasses

import keras
import pytest

from kerasmp.backend import devices
from kerasmp.backend.devices import Device
from kerasmp.policy import Policy, Recommendation, hardware, recommend_policy

BF16 = frozenset({"avx2", "avx512_bf16"})
AMX = frozenset({"amx_bf16"})
BOTH = BF16 | AMX
PLAIN = frozenset({"avx2", "avx512f"})


def gpu(*capability):
    return Device("gpu", "A GPU", "jax", capability=capability or None)


def cpu(flags, framework="tensorflow", *, onednn=True):
    return Device("cpu", "A CPU", framework, flags=flags, onednn=onednn)


TABLE = [
    (Device("tpu", "TPU v4", "jax"), "mixed_bfloat16", "TPUs multiply in bfloat16"),
    (gpu(3, 5), "float32", "3.5 has no tensor cores"),
    (gpu(6, 1), "float32", "6.1 has no tensor cores"),
    (gpu(7, 0), "mixed_float16", "7.0 has tensor cores for float16 but not for bfloat16"),
    (gpu(7, 5), "mixed_float16", "7.5 has tensor cores for float16"),
    (gpu(8, 0), "mixed_bfloat16", "8.0 has tensor cores for bfloat16"),
    (gpu(9, 0), "mixed_bfloat16", "9.0 has tensor cores for bfloat16"),
    (gpu(10, 0), "mixed_bfloat16", "10.0 has tensor cores for bfloat16"),
    (gpu(), "float32", "no NVIDIA compute capability"),
    (cpu(BF16), "mixed_bfloat16", "use AVX512_BF16:"),
    (cpu(AMX), "mixed_bfloat16", "use AMX_BF16:"),
    (cpu(BOTH), "mixed_bfloat16", "use AVX512_BF16 and AMX_BF16:"),
    (cpu(BF16, onednn=False), "float32", "switched off by TF_ENABLE_ONEDNN_OPTS"),
    (cpu(BF16, "jax", onednn=False), "float32", "only TensorFlow was measured to gain"),
    (cpu(BF16, "torch", onednn=False), "float32", "only TensorFlow was measured to gain"),
    (cpu(PLAIN), "float32", "neither AVX512_BF16 nor AMX_BF16"),
    (cpu(None), "float32", "is not known here"),
]


@pytest.mark.parametrize(("device", "name", "why"), TABLE)
def test_the_decision(device, name, why):
    chosen, reason = hardware.decide(device)
    assert chosen == name
    assert why in reason


@pytest.mark.parametrize(("device", "name", "why"), TABLE)
def test_the_recommendation_is_a_policy_one_sentence_and_the_device(device, name, why, monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "detect", lambda framework: asked.append(framework) or device)
    advice = recommend_policy()
    assert asked == [keras.backend.backend()]
    assert advice == Recommendation(Policy(name), advice.reason, device.name)
    assert Policy("auto") == advice.policy
    assert why in advice.reason
    assert advice.reason.endswith(".")
    assert ". " not in advice.reason
    with pytest.raises(dataclasses.FrozenInstanceError):
        advice.reason = ""


def test_the_recommendation_for_this_machine_is_usable():
    advice = recommend_policy()
    assert advice.policy.variable_dtype == "float32"
    assert advice.device
    outputs = keras.layers.Dense(1, dtype=advice.policy.to_keras())(keras.ops.ones((1, 2)))
    assert keras.backend.standardize_dtype(outputs.dtype) == advice.policy.compute_dtype
