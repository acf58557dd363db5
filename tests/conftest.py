"""What every test needs: its backend's tests only, a fresh global policy, a fixed seed."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# The CPU jobs must not reserve an accelerator that happens to be there.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import pytest


def pytest_collection_modifyitems(config, items):
    """Deselect, rather than skip, tests that belong to another backend."""
    running = keras.backend.backend()
    kept, dropped = [], []
    for item in items:
        marker = item.get_closest_marker("backend")
        (kept if marker is None or running in marker.args else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def _fresh_keras():
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(1)
    yield
    keras.config.set_dtype_policy(policy)
    keras.backend.clear_session(free_memory=False)  # collecting garbage costs 0.3 s a test
