"""MultiWorkerMirroredStrategy: two processes on loopback decide the same, and neither hangs."""

import numpy as np
import pytest
from helpers import bad_batch, processes
from helpers.bad_batch import DATA, OVERFLOW

pytestmark = [pytest.mark.backend("tensorflow"), pytest.mark.timeout(processes.SECONDS + 10)]

FIRST_WORKER, SECOND_WORKER = 0, bad_batch.ROWS - 1


def train(cls, bad, **more):
    return processes.cluster("helpers.workers:train", 2, cls=cls, bad=bad, **more)


def test_a_bad_batch_of_either_worker_is_skipped_by_both():
    # One trace serves them all.
    bad = [(value, row) for value in (OVERFLOW, DATA) for row in (FIRST_WORKER, SECOND_WORKER)]
    first, second = train("ours", bad)
    assert first == second
    clean, *runs = first
    assert np.isfinite(clean["weights"]).all()
    assert (clean["skipped"], clean["applied"]) == (0, 4)
    for run, (value, _) in zip(runs, bad, strict=True):
        assert run["weights"] == clean["weights"]
        assert (run["skipped"], run["applied"]) == (1, 4)
        assert run["scale"] == bad_batch.SCALE / (2 if value == OVERFLOW else 1)


@pytest.mark.full
def test_stock_keras_hangs_where_one_worker_overflows():
    """Fault 2."""
    # The clean training takes less than a second: 10 seconds are too long even on a busy machine.
    with pytest.raises(processes.HungError) as error:
        train("stock", [(OVERFLOW, SECOND_WORKER)], patience=10)
    assert str(error.value).count("trained without a bad batch") == 2
    assert f"trained with bad row {SECOND_WORKER}" not in str(error.value)
