"""Run only the tests of the current backend, each with a fresh global policy and a fixed seed.

With KERAS_BACKEND=numpy the unit tests run, without a framework; elsewhere all the others.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# Tests run on the CPU and must not reserve an accelerator of this machine.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# On CPUs with float16 instructions oneDNN sums products in float32, which hides faults of stock
# Keras; it is also six times slower than TensorFlow's kernels. Without it all CPUs do the same.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Tests compile more than they compute, and LLVM's optimisations take a third of their time. On JAX
# some tests compare compiled steps bit for bit, but two compilations of one formula may fuse
# different products and sums: in the last bit the steps of Adagrad, Adafactor and Ftrl differ at
# level 0, those of Muon at levels 1 and 2. Plain AVX has no fused multiply-add.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_max_isa=AVX" if os.environ["KERAS_BACKEND"] == "jax" else ""),
)

import atexit
import gc
import importlib.util
import shutil
import sys
import tempfile

# For every model JAX compiles each operation of an eager step again, half of the tests' time. The
# cache shares compiled code between tests, pytest workers and the processes that tests start.
if os.environ["KERAS_BACKEND"] == "jax" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kerasmp-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import keras
import numpy as np
import pytest
from helpers import processes

# Collecting garbage as often as Python's default takes an eighth of the time.
gc.set_threshold(100_000, 50, 100)

# Keras imports TensorFlow where it is installed, for example to save a layer. Unit tests do not
# need it, and it takes seconds.
if keras.backend.backend() == "numpy":
    sys.modules["tensorflow"] = None

# Without the packages of the `demo` extra the demo cannot run.
_DEMO = ("jinja2", "matplotlib", "rich", "sklearn", "tensorflow_datasets", "typer")
collect_ignore = (
    [] if all(map(importlib.util.find_spec, _DEMO)) else ["demo", "report", "test_cli.py"]
)


def pytest_ignore_collect(collection_path):
    """On NumPy skip files without unit tests: importing them needs a framework."""
    if keras.backend.backend() == "numpy" and collection_path.name.startswith("test_"):
        return "mark.unit" not in collection_path.read_text(encoding="utf-8") or None
    return None


def _version(text):
    return tuple(int(number) for number in text.split(".")[:3])


# Keras ships its tests since this version.
if _version(keras.__version__) < (3, 15, 1):
    collect_ignore += ["layers/test_keras_own_layer_tests.py", "optimizer/test_keras_own_tests.py"]


def _belongs_here(item):
    if (item.get_closest_marker("unit") is not None) != (keras.backend.backend() == "numpy"):
        return False
    backend, since = item.get_closest_marker("backend"), item.get_closest_marker("keras")
    return (backend is None or keras.backend.backend() in backend.args) and (
        since is None or _version(keras.__version__) >= _version(since.args[0])
    )


def pytest_collection_modifyitems(config, items):
    """Deselect, rather than skip, tests that belong to another backend or a newer Keras."""
    kept, dropped = [], []
    for item in items:
        (kept if _belongs_here(item) else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def _fresh_keras():
    policy = keras.config.dtype_policy()
    if keras.backend.backend() == "numpy":
        # Numbers become inf and NaN silently, as in every framework. Keras itself makes some: on
        # NumPy it infers shapes by computing with uninitialised memory.
        with np.errstate(all="ignore"):
            yield
        keras.config.set_dtype_policy(policy)
        return
    keras.utils.set_random_seed(1)
    yield
    keras.config.set_dtype_policy(policy)
    keras.backend.clear_session(free_memory=False)  # collecting garbage costs 0.3 s a test


@pytest.fixture(autouse=True)
def _only_its_tests_probe_the_first_batch(request, monkeypatch):
    """Turn the probe of `fit` off in all other tests, whose time it would double."""
    if request.path.parent.name != "probe":
        for module in ("kerasmp.model.first_batch", "kerasmp.callbacks.overflow_monitor"):
            monkeypatch.setattr(f"{module}.look_at_first_batch", lambda _: None)


@pytest.fixture(scope="session")
def another_process():
    """A process that has made none of the models of a test; other tests may have used it before."""
    kept = processes.Kept()
    yield kept.call
    kept.close()
