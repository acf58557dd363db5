from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    """Leave other backends than TensorFlow, where the demo's packages may be, to the full set."""
    if keras.backend.backend() in {"jax", "torch"}:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.full)


def striped(count, seed):
    """Images of 0 to 16 whose brightest row is their label: a task that is quickly learnt."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = generator.integers(0, 6, (count, 8, 8, 1))
    images[np.arange(count), 2 * labels] = 16
    return images.astype("uint8"), labels.astype("int32")


@pytest.fixture(scope="session")
def images():
    """What the demo loads from the disk, without the packages that it needs for that."""
    return SimpleNamespace(
        name="stripes 1.0.0",
        train=striped(48, 0),
        test=striped(20, 1),
        spec=SimpleNamespace(shape=(8, 8, 1), classes=4, brightest=16.0),
    )
