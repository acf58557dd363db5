"""A strategy with one replica behaves as no strategy, in applied and in skipped steps."""

import pytest
from helpers import bad_batch
from helpers.marks import few

pytestmark = pytest.mark.backend("tensorflow")

STRATEGIES = ("MirroredStrategy", "OneDeviceStrategy", None)


def trained(name, way, *, build=True):
    """Return the outcome of training without a bad batch, and with one."""
    import tensorflow as tf
    from helpers import mirrored

    if name is None:
        strategy = tf.distribute.get_strategy()
    else:
        device = ["CPU:0"] if name == "MirroredStrategy" else "CPU:0"
        strategy = getattr(tf.distribute, name)(device)
    feeds = [bad_batch.batches(), bad_batch.batches(0)]
    if build:  # one trace serves both
        return mirrored.runs(strategy, "ours, not fused", way, feeds)
    return [mirrored.runs(strategy, "ours, not fused", way, [d], build=False)[0] for d in feeds]


CASES = [("loop", True), ("loop", False), ("fit", False), ("fit", True)]


@pytest.mark.parametrize(("way", "build"), few(CASES, CASES[:1]))
def test_one_replica_trains_and_skips_as_without_a_strategy(way, build):
    mirrored, one_device, none = (trained(name, way, build=build) for name in STRATEGIES)
    assert mirrored == one_device == none
    clean, bad = none
    assert bad["weights"] == clean["weights"]
    assert (clean["applied"], clean["skipped"], clean["scale"]) == (4, 0, bad_batch.SCALE)
    assert (bad["applied"], bad["skipped"], bad["scale"]) == (4, 1, bad_batch.SCALE / 2)
