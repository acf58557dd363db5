import numpy as np
import pytest

from kerasmp.demo import run
from kerasmp.demo.dataset import Images


def striped(count, seed):
    """Images of 0 to 16 whose brightest row is their label: a task that is quickly learnt."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = generator.integers(0, 6, (count, 8, 8, 1))
    images[np.arange(count), 2 * labels] = 16
    return images.astype("uint8"), labels.astype("int32")


@pytest.fixture(scope="session")
def images():
    return Images("stripes 1.0.0", striped(48, 0), striped(20, 1), 4)


@pytest.fixture
def no_disk(monkeypatch, images):
    """Let `run_demo` train on `images`, so that it needs no package but Keras."""
    monkeypatch.setattr(run, "load", lambda _: images)
