"""MultiWorkerMirroredStrategy: two processes on loopback decide alike, and neither waits."""

import numpy as np
import pytest
from helpers import bad_batch, processes

pytestmark = pytest.mark.backend("tensorflow")

OVERFLOW, DATA = 3000.0, float("inf")  # a finite loss whose gradient overflows; a loss that is inf
FIRST_WORKER, SECOND_WORKER = 0, bad_batch.ROWS - 1


def train(cls, value, bad_rows, seconds=55):
    return processes.cluster(
        "helpers.workers:train", 2, seconds=seconds, cls=cls, value=value, bad_rows=bad_rows
    )


@pytest.mark.parametrize(
    ("value", "scale"), [(OVERFLOW, bad_batch.SCALE / 2), (DATA, bad_batch.SCALE)]
)
def test_a_bad_batch_of_either_worker_is_skipped_by_both(value, scale):
    first, second = train("ours", value, [None, FIRST_WORKER, SECOND_WORKER])
    assert first == second
    clean, *bad = first
    assert np.isfinite(clean["weights"]).all()
    assert (clean["skipped"], clean["applied"]) == (0, 4)
    for run in bad:
        assert run["weights"] == clean["weights"]
        assert (run["skipped"], run["applied"], run["scale"]) == (1, 4, scale)


def test_stock_keras_hangs_where_one_worker_overflows():
    """Fault 2."""
    with pytest.raises(processes.HungError, match="trained with bad row None") as error:
        train("stock", OVERFLOW, [None, SECOND_WORKER], seconds=30)
    assert f"trained with bad row {SECOND_WORKER}" not in str(error.value)
