from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    """Run the tests on JAX and torch in the full set only; the demo's packages may be there too."""
    if keras.backend.backend() in {"jax", "torch"}:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.full)


def striped(count, seed):
    """Return images of 0 to 16 whose brightest row is the label: a task that is learnt quickly."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = generator.integers(0, 6, (count, 8, 8, 1))
    images[np.arange(count), 2 * labels] = 16
    return images.astype("uint8"), labels.astype("int32")


@pytest.fixture(scope="session")
def images():
    """A data set as the demo loads it, made without the packages that reading one needs."""
    return SimpleNamespace(
        name="stripes 1.0.0",
        train=striped(48, 0),
        test=striped(20, 1),
        spec=SimpleNamespace(shape=(8, 8, 1), classes=4, brightest=16.0),
    )
