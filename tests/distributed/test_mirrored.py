"""MirroredStrategy: what one replica cannot use, none uses.

Each process trains without the bad batch, and then with it, its bad row on each replica in turn.
"""

import numpy as np
import pytest
from helpers import bad_batch, processes

pytestmark = pytest.mark.backend("tensorflow")

OVERFLOW, DATA = 3000.0, float("inf")  # a finite loss whose gradient overflows; a loss that is inf


def train(cls, ways, replicas, value, **more):
    return processes.call(
        "helpers.mirrored:train", cls=cls, ways=ways, replicas=replicas, value=value, **more
    )


def assert_skipped_everywhere(runs, replicas):
    """Fault 1."""
    assert np.isfinite(runs["clean"]["weights"]).all()
    assert len(runs["bad"]) == replicas
    for run in runs["bad"]:
        assert run["weights"] == runs["clean"]["weights"]
        assert (run["skipped"], run["applied"]) == (1, 4)
        assert len(run["copies"]) == replicas
        assert all(copy == run["copies"][0] for copy in run["copies"])


@pytest.mark.parametrize("replicas", [2, 4])
# Collectives of eager code clash with those of a graph before it: a process for each.
@pytest.mark.parametrize("ways", [["fit", "loop", "unscaling"], ["eager fit"]], ids="-".join)
def test_one_bad_replica_any_of_them_is_skipped_on_all(ways, replicas):
    results = train("ours", ways, replicas, OVERFLOW)
    for runs in results.values():
        assert_skipped_everywhere(runs, replicas)
        assert [run["scale"] for run in runs["bad"]] == [bad_batch.SCALE / 2] * replicas
    if "unscaling" in ways:
        assert results["unscaling"] == results["loop"]


def test_a_kerasmp_model_skips_bad_data_with_all_its_traces():
    runs = train("ours", ["fit"], 2, DATA, guarded=True)["fit"]
    assert_skipped_everywhere(runs, 2)  # the weights hold BatchNormalization's statistics


def test_stock_keras_applies_the_second_replicas_overflow_and_destroys_the_weights():
    runs = train("stock", ["fit"], 2, OVERFLOW)["fit"]
    assert np.isfinite(runs["clean"]["weights"]).all()
    assert not np.isfinite(runs["bad"][1]["weights"]).all()
