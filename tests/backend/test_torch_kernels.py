"""Missing kernels of torch are found, and the probes have no side effects."""

import importlib

import keras
import pytest

from kerasmp import backend
from kerasmp.errors import BackendError

pytestmark = pytest.mark.backend("torch")


@pytest.fixture
def torch(monkeypatch):
    """Return torch, before any probe for a kernel."""
    monkeypatch.setattr("kerasmp.backend.torch_tracing._KERNELS", {})
    return importlib.import_module("torch")


def trace(function, *shape, device="cpu"):
    with keras.device(device):
        backend.trace(function, (keras.KerasTensor(shape, "float16"),), {}, backwards=True)


@pytest.mark.parametrize("numbers", [False, True])
def test_random_generators_are_restored(torch, numbers):
    def draws(x):
        if numbers:
            x.tolist()  # fails in a trace, and then Keras runs the call
        return torch.nn.functional.dropout(torch.bernoulli(x, generator=own))

    own = torch.Generator()
    before = [each.get_state() for each in (own, torch.default_generator)]
    trace(draws, 2, 4)
    after = [each.get_state() for each in (own, torch.default_generator)]
    assert all(map(torch.equal, after, before))


def test_the_device_of_the_users_scope_is_probed(torch):
    trace(torch.linalg.svdvals, 4, 4, device="meta")  # which has every kernel
    with pytest.raises(BackendError, match="no float16 kernel"):
        trace(torch.linalg.svdvals, 4, 4)


def test_an_index_in_a_probe_is_valid_for_an_axis_of_length_1(torch):
    """With another index, a GPU's kernel would abort the process."""
    given = (torch.ones(1, dtype=torch.float16), [torch.zeros(2, dtype=torch.int64)])
    call = importlib.import_module("kerasmp.backend.torch_tracing")._call_on_few
    call(torch.ops.aten.index.Tensor, (given, {}), torch.device("cpu"), backwards=True)


def test_sizes_among_the_arguments_of_a_probe_are_small(torch):
    """No memory could hold a result of the real size."""

    def enlarges(x):
        return torch.nn.functional.interpolate(torch.complex(x, x), size=(10**6, 10**6))

    with pytest.raises(BackendError, match="no float16 kernel for upsample_nearest2d"):
        trace(enlarges, 1, 1, 4, 4)


def test_a_users_operation_is_not_run(torch):
    calls = []

    @torch.library.custom_op("kerasmp_tests::counted", mutates_args=())
    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.device.type)
        return x.clone()

    counted.register_fake(torch.empty_like)
    trace(counted, 2, 4)
    assert not calls


def test_an_inconclusive_probe_hides_no_missing_kernel(torch):
    pool = torch.nn.functional.avg_pool3d
    trace(
        lambda x: pool(x, 32, padding=16), 1, 1, 64, 64, 64
    )  # this padding is too much for size 8
    with pytest.raises(BackendError, match="no float16 kernel for avg_pool3d"):
        trace(lambda x: pool(x, 2), 1, 1, 4, 4, 4)
