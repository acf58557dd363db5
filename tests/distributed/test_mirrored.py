"""MirroredStrategy: what one replica cannot use, none uses.

Each process trains without the bad batch, and then with it, its bad row on each replica in turn.
"""

import keras
import numpy as np
import pytest
from helpers import bad_batch, processes
from keras import ops

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


def apply_once(*cases):
    return processes.call("helpers.mirrored:apply_once", replicas=2, cases=cases)


def test_gradients_that_overflow_only_in_their_sum_are_skipped():
    each = 2e38 / bad_batch.SCALE  # times the scale finite on each replica, but not the sum of both
    both, cancelling = apply_once(
        {"parts": [[each, 0.0], [each, 1.0]]}, {"parts": [[each, 0.0], [-each, 1.0]]}
    )
    assert both == {"weight": [0.0, 0.0], "skipped": 1}
    assert cancelling == {"weight": [0.0, -1.0], "skipped": 0}


def test_clipping_goes_by_the_gradient_of_the_whole_batch():
    parts, whole = [[3.0, -1.0], [0.0, 5.0]], [3.0, 4.0]
    clipping = [{"global_clipnorm": 1.0}, {"clipnorm": 1.0}, {"clipvalue": 3.5}]
    results = apply_once(
        *({"parts": parts, "cls": cls} | each for cls in ("ours", "stock") for each in clipping)
    )
    weights = [result["weight"] for result in results]
    one_device = []
    for each in clipping:
        weight = keras.Variable([0.0, 0.0])
        keras.optimizers.SGD(1.0, **each).apply([ops.array(whole)], [weight])
        one_device.append(ops.convert_to_numpy(weight))
    np.testing.assert_allclose(weights[:3], one_device, rtol=1e-6)
    # Stock Keras clips each replica's share by itself, and adds up what is left of them.
    assert (np.abs(np.subtract(weights[3:], one_device)).max(axis=1) > 0.1).all()
