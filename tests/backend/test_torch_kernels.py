"""What torch has no kernel for is found, and to ask for a kernel changes nothing."""

import importlib

import keras
import pytest

from kerasmp import backend

pytestmark = pytest.mark.backend("torch")


@pytest.fixture
def torch(monkeypatch):
    """Return torch, which was not asked for any kernel."""
    monkeypatch.setattr("kerasmp.backend.torch._KERNELS", {})
    return importlib.import_module("torch")


def trace(function, *shape):
    with keras.device("cpu"):
        backend.trace(function, (keras.KerasTensor(shape, "float16"),), {}, backwards=True)


@pytest.mark.parametrize("numbers", [False, True])
def test_random_generators_stay_as_they_were(torch, numbers):
    def draws(x):
        if numbers:
            x.tolist()  # of which there are none in a trace: then Keras runs the call
        return torch.nn.functional.dropout(torch.bernoulli(x, generator=own))

    own = torch.Generator()
    before = [each.get_state() for each in (own, torch.default_generator)]
    trace(draws, 2, 4)
    after = [each.get_state() for each in (own, torch.default_generator)]
    assert all(map(torch.equal, after, before))
