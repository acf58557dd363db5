"""MirroredStrategy: a bad gradient on one replica skips the step on all of them.

Each case trains without the bad batch, and then with it, its bad row on each replica in turn.
"""

import numpy as np
import pytest
from helpers import bad_batch, processes
from helpers.bad_batch import DATA, OVERFLOW, assert_skipped_everywhere

pytestmark = [
    pytest.mark.full,  # the quick set has two replicas: test_replicas
    pytest.mark.backend("tensorflow"),
    pytest.mark.timeout(processes.SECONDS + 10),
]


def train(replicas, *cases, where=None):
    where = range(replicas) if where is None else where
    return processes.call(
        "helpers.mirrored:train", replicas=replicas, cases=cases, where=list(where)
    )


def ours(way, value=OVERFLOW, **more):
    return {"cls": "ours", "way": way, "value": value, **more}


def test_one_bad_replica_any_of_four_is_skipped_on_all():
    loop, fit = train(4, ours("loop"), ours("fit"))
    assert_skipped_everywhere(loop, 4)
    assert_skipped_everywhere(fit, 4)


def test_one_bad_replica_is_skipped_on_all_with_manual_unscaling_and_custom_train_steps():
    loop, unscaling, own_step = train(
        2,
        ours("loop"),
        ours("unscaling"),
        ours("fit", DATA, guarded=True, own_step=True),
    )
    assert_skipped_everywhere(unscaling, 2)
    assert unscaling == loop
    # The cause is known to be the loss: the scale stays.
    assert_skipped_everywhere(own_step, 2, bad_batch.SCALE)


def test_train_steps_that_scale_no_loss_are_detected():
    (wanted, _), *others = processes.call("helpers.mirrored:custom_train_steps", replicas=2)
    assert [times for _, times in others] == [1, 0]
    for weights, _ in others:
        np.testing.assert_allclose(weights, wanted, rtol=1e-3, atol=1e-4)


# Eager collectives clash with those of an earlier graph: each needs its own process.
@pytest.mark.parametrize("replicas", [2, 4])
def test_one_bad_replica_is_skipped_on_all_in_an_eager_fit(replicas):
    where = [0, replicas - 1]  # eager steps are slow
    (runs,) = train(replicas, ours("eager fit"), where=where)
    assert_skipped_everywhere(runs, replicas, where=where)


def test_stock_keras_applies_the_second_replicas_overflow_and_destroys_the_weights():
    (runs,) = train(2, {"cls": "stock", "way": "fit", "value": OVERFLOW})
    assert np.isfinite(runs["clean"]["weights"]).all()
    assert not np.isfinite(runs["bad"][1]["weights"]).all()
