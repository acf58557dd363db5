"""Detection and recommendation: the answers of each framework and system, without the hardware."""

import dataclasses
import sys
from types import SimpleNamespace

import keras
import pytest

from kerasmp.backend import devices
from kerasmp.backend.devices import Device, Gpu
from kerasmp.policy import Policy, Recommendation, recommend_policy

pytestmark = pytest.mark.unit
T4 = Gpu("GPU-aaa", "Tesla T4", (7, 5))
A100 = Gpu("GPU-bbb", "NVIDIA A100, 80GB", (8, 0))
P100 = Gpu("GPU-bbc", "Tesla P100", (6, 0))
CPUINFO = (
    "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx512_bf16\n\n"
    "processor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n"
)


@pytest.fixture
def cpuinfo(monkeypatch, tmp_path):
    def write(text):
        path = tmp_path / "cpuinfo"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(devices, "_CPUINFO", path)

    write(CPUINFO)
    return write


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Puts an `nvidia-smi` on the path that runs the given shell line, and shows all GPUs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def install(line):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        program.chmod(0o755)

    return install


def two_gpus(smi):
    smi('echo "GPU-aaa, Tesla T4, 7.5"; echo "GPU-bbb, NVIDIA A100, 8.0"')


# --- the CPU


@pytest.mark.usefixtures("cpuinfo")
def test_a_cpu_is_read_from_linux():
    flags = frozenset({"fpu", "avx512_bf16"})
    assert devices.detect("numpy") == Device("cpu", "Fast CPU", "numpy", flags=flags)


def test_a_cpu_without_flags_is_unknown(cpuinfo):
    cpuinfo("model name : Arm\nFeatures : bf16\n")
    assert devices.detect("numpy") == Device("cpu", "Arm", "numpy")


def test_a_system_without_cpuinfo_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    assert devices.detect("numpy") == Device("cpu", "arm64", "numpy")
    monkeypatch.setattr(devices.platform, "machine", lambda: "")
    assert devices.detect("numpy").name == "CPU"


@pytest.mark.parametrize(
    ("setting", "on"),
    [(None, True), ("1", True), ("true", True), ("0", False), ("False", False)],
)
@pytest.mark.usefixtures("cpuinfo")
def test_onednn_is_on_unless_switched_off(setting, on, monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if setting is not None:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", setting)
    assert devices._cpu("tensorflow").onednn is on
    assert devices._cpu("jax").onednn is False


# --- nvidia-smi and CUDA_VISIBLE_DEVICES


def test_nvidia_smi_is_read(smi):
    two_gpus(smi)
    assert devices.visible_gpus() == [T4, Gpu("GPU-bbb", "NVIDIA A100", (8, 0))]


def test_nvidia_smi_is_asked_for_these_columns(smi):
    smi("""echo "GPU-1, \\"$1 $2\\", 9.0" """)
    (gpu,) = devices.visible_gpus()
    assert gpu.name == "--query-gpu=uuid,name,compute_cap --format=csv,noheader"


def test_a_capability_that_is_not_one_is_unknown(smi):
    smi('echo "GPU-1, Odd, [N/A]"')
    assert devices.visible_gpus() == [Gpu("GPU-1", "Odd", None)]


@pytest.mark.parametrize("line", ["exit 9", "echo 'Field \"compute_cap\" is not valid.'", "exit 0"])
def test_a_failing_nvidia_smi_finds_nothing(line, smi):
    smi(line)
    assert devices.visible_gpus() == []


def test_a_hanging_nvidia_smi_is_given_up(smi, monkeypatch):
    monkeypatch.setattr(devices, "_TIMEOUT", 0.05)
    smi("while :; do :; done")
    assert devices.visible_gpus() == []


@pytest.mark.usefixtures("smi")
def test_no_nvidia_smi_finds_nothing():
    assert devices.visible_gpus() == []


def test_the_environment_hides_gpus(smi, monkeypatch):
    two_gpus(smi)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert devices.visible_gpus() == [T4]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(devices.visible_gpus()) == 2
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [gpu.uuid for gpu in devices.visible_gpus()] == ["GPU-bbb"]


@pytest.mark.parametrize(
    ("setting", "by_bus", "expected"),
    [
        (None, False, [T4, A100, P100]),
        ("", False, []),
        ("-1", True, []),
        ("NoDevFiles,-1", False, [T4, A100, P100]),
        ("0", True, [T4]),
        (" 1 , 0 ", True, [A100, T4]),
        ("0,-1,1", True, [T4]),
        ("2,7", True, [P100]),
        ("GPU-bb", False, [A100, P100]),
        ("GPU-bbb,GPU-aaa", False, [T4, A100]),
        ("GPU-zzz", False, []),
        ("0", False, [T4, A100, P100]),
        ("MIG-123", True, [T4, A100, P100]),
    ],
)
def test_visible_gpus(setting, by_bus, expected):
    assert devices.visible([T4, A100, P100], setting, by_bus=by_bus) == expected


def test_the_weakest_gpu_counts():
    found = devices._weakest("jax", [gpu[1:] for gpu in (A100, P100, T4)])
    assert found == Device("gpu", "Tesla P100 (compute capability 6.0)", "jax", capability=(6, 0))
    assert devices._weakest("jax", [("Odd", None), A100[1:]]) == Device("gpu", "Odd", "jax")
    assert devices._weakest("jax", []) is None


# --- frameworks, as they would answer


def fake_tensorflow(tpus=(), gpus=()):
    details = dict(enumerate(gpus))
    return SimpleNamespace(
        config=SimpleNamespace(
            list_physical_devices=lambda kind: [
                SimpleNamespace(name=name) for name in tpus if kind == "TPU"
            ],
            get_visible_devices=lambda kind: list(details) if kind == "GPU" else [],
            experimental=SimpleNamespace(get_device_details=details.__getitem__),
        )
    )


@pytest.mark.parametrize(
    ("fake", "expected"),
    [
        (fake_tensorflow(tpus=["/TPU:0"]), Device("tpu", "/TPU:0", "tensorflow")),
        (
            fake_tensorflow(gpus=[{"device_name": "T4", "compute_capability": (7, 5)}]),
            Device("gpu", "T4 (compute capability 7.5)", "tensorflow", capability=(7, 5)),
        ),
        (
            fake_tensorflow(gpus=[{"device_name": "METAL"}]),
            Device("gpu", "METAL", "tensorflow"),
        ),
        (fake_tensorflow(gpus=[{}]), Device("gpu", "GPU", "tensorflow")),
    ],
)
def test_tensorflow(fake, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", fake)
    assert devices.detect("tensorflow") == expected


@pytest.mark.usefixtures("cpuinfo")
def test_tensorflow_without_accelerator(monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow", fake_tensorflow())
    device = devices.detect("tensorflow")
    assert (device.kind, device.name, device.onednn) == ("cpu", "Fast CPU", True)


class FakeJax:
    """JAX with a setting, and with devices that count how often they are initialised."""

    def __init__(self, platforms="", found=()):
        self.config = SimpleNamespace(jax_platforms=platforms)
        self.found = found
        self.started = 0

    def devices(self):
        self.started += 1
        return list(self.found)


def jax_device(platform, kind, **more):
    return SimpleNamespace(platform=platform, device_kind=kind, **more)


@pytest.fixture
def as_jax(monkeypatch):
    def install(fake, plugins):
        monkeypatch.setitem(sys.modules, "jax", fake)
        monkeypatch.setattr(devices, "_jax_plugins", lambda: list(plugins))
        return fake

    return install


def test_jax_with_an_nvidia_gpu_is_not_started(smi, as_jax):
    two_gpus(smi)
    fake = as_jax(FakeJax(), ["xla_cuda12"])
    expected = Device("gpu", "Tesla T4 (compute capability 7.5)", "jax", capability=(7, 5))
    assert devices.detect("jax") == expected
    assert fake.started == 0


@pytest.mark.parametrize(
    ("platforms", "plugins"), [(None, []), ("", []), ("cpu", ["xla_cuda12"]), ("cpu,cuda", ["tpu"])]
)
@pytest.mark.usefixtures("cpuinfo")
def test_jax_on_a_cpu_is_not_started(platforms, plugins, smi, as_jax):
    two_gpus(smi)
    fake = as_jax(FakeJax(platforms), plugins)
    assert devices.detect("jax").name == "Fast CPU"
    assert fake.started == 0


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (jax_device("tpu", "TPU v4"), Device("tpu", "TPU v4", "jax")),
        (
            jax_device("gpu", "H200", compute_capability="9.0"),
            Device("gpu", "H200 (compute capability 9.0)", "jax", capability=(9, 0)),
        ),
        (
            jax_device("gpu", "MI300", compute_capability="gfx942"),
            Device("gpu", "MI300", "jax"),
        ),
        (jax_device("METAL", "Metal"), Device("gpu", "Metal", "jax")),
    ],
)
@pytest.mark.parametrize("plugins", [["xla_cuda12"], ["tpu"]])
@pytest.mark.usefixtures("smi")
def test_jax_is_asked_where_nvidia_smi_cannot_answer(found, expected, plugins, as_jax):
    fake = as_jax(FakeJax(None, [found]), plugins)
    assert devices.detect("jax") == expected
    assert fake.started == 1


@pytest.mark.usefixtures("smi", "cpuinfo")
def test_jax_that_falls_back_to_the_cpu(as_jax):
    as_jax(FakeJax("", [jax_device("cpu", "cpu")]), ["xla_cuda12"])
    assert devices.detect("jax").name == "Fast CPU"


def test_jax_configured_for_a_tpu_does_not_ask_nvidia(smi, as_jax):
    two_gpus(smi)
    as_jax(FakeJax("tpu", [jax_device("tpu", "TPU v5")]), ["xla_cuda12", "tpu"])
    assert devices.detect("jax").kind == "tpu"


def test_plugins_of_jax_are_found_by_their_entry_points(monkeypatch):
    entries = {"jax_plugins": [SimpleNamespace(name="xla_cuda13")]}
    monkeypatch.setattr(
        devices.importlib.metadata, "entry_points", lambda group: entries.get(group, [])
    )
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: None)
    assert devices._jax_plugins() == ["xla_cuda13"]
    monkeypatch.setattr(devices.importlib.util, "find_spec", {"libtpu": object()}.get)
    assert devices._jax_plugins() == ["xla_cuda13", "tpu"]


class FakeCuda:
    def __init__(self, gpus):
        self.gpus = gpus
        self.started = 0

    def is_available(self):
        return bool(self.gpus)

    def device_count(self):
        return len(self.gpus)

    def get_device_name(self, index):
        return self.gpus[index][0]

    def get_device_capability(self, index):
        self.started += 1
        return self.gpus[index][1]


def fake_torch(*, mps=False, cuda=(), version="12.6", xpu=False):
    return SimpleNamespace(
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        cuda=FakeCuda(cuda),
        version=SimpleNamespace(cuda=version),
        xpu=SimpleNamespace(is_available=lambda: xpu),
    )


@pytest.fixture
def as_torch(monkeypatch):
    monkeypatch.delenv("KERAS_TORCH_DEVICE", raising=False)

    def install(**answers):
        fake = fake_torch(**answers)
        monkeypatch.setitem(sys.modules, "torch", fake)
        return fake

    return install


def test_torch_with_an_nvidia_gpu_is_not_started(smi, as_torch):
    two_gpus(smi)
    fake = as_torch(cuda=[("T4", (7, 5))])
    expected = Device("gpu", "Tesla T4 (compute capability 7.5)", "torch", capability=(7, 5))
    assert devices.detect("torch") == expected
    assert fake.cuda.started == 0


@pytest.mark.usefixtures("smi")
def test_torch_is_asked_where_nvidia_smi_cannot_answer(as_torch):
    fake = as_torch(cuda=[("A100", (8, 0)), ("V100", (7, 0))])
    expected = Device("gpu", "V100 (compute capability 7.0)", "torch", capability=(7, 0))
    assert devices.detect("torch") == expected
    assert fake.cuda.started == 2


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ({"mps": True}, "Apple GPU (MPS)"),
        ({"cuda": [("MI300", (9, 4))], "version": None}, "AMD GPU (ROCm)"),
        ({"xpu": True}, "Intel GPU (XPU)"),
    ],
)
def test_other_gpus_of_torch_have_no_nvidia_capability(answers, name, smi, as_torch):
    two_gpus(smi)
    as_torch(**answers)
    assert devices.detect("torch") == Device("gpu", name, "torch")


@pytest.mark.usefixtures("cpuinfo")
def test_torch_on_a_cpu(as_torch):
    as_torch()
    assert devices.detect("torch").name == "Fast CPU"


@pytest.mark.usefixtures("cpuinfo")
def test_torch_configured_for_the_cpu_by_keras(as_torch, monkeypatch):
    as_torch(cuda=[("T4", (7, 5))])
    monkeypatch.setenv("KERAS_TORCH_DEVICE", "cpu:0")
    assert devices.detect("torch").name == "Fast CPU"


# --- what is advised for each kind of device


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
    (cpu(BF16, "jax", onednn=False), "float32", "a gain was measured only with TensorFlow"),
    (cpu(BF16, "torch", onednn=False), "float32", "a gain was measured only with TensorFlow"),
    (cpu(PLAIN), "float32", "neither AVX512_BF16 nor AMX_BF16"),
    (cpu(None), "float32", "instruction sets of this CPU are unknown"),
]


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
