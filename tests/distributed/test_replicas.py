"""Two replicas of MirroredStrategy do what one device does with the whole batch."""

import itertools

import keras
import numpy as np
import pytest
from helpers import processes
from helpers.bad_batch import SCALE
from keras import ops

pytestmark = [pytest.mark.backend("tensorflow"), pytest.mark.timeout(processes.SECONDS + 10)]


def run(*cases):
    """Start TensorFlow once for all cases: that takes longer than they do."""
    return processes.call("helpers.replicas:run", cases=cases)


def assert_like_one_device(ours, one_device):
    for steps in ours:
        first, second = steps["trained"]
        assert first == second
        first, second = steps["own"]
        assert first == second
    for steps, (expected,) in zip(ours, (s["trained"] for s in one_device), strict=False):
        np.testing.assert_allclose(steps["trained"][0], expected, rtol=1e-6, atol=1e-7)


def assert_like_a_plain_optimizer(ours, plain):
    assert_like_one_device(ours, plain)
    assert ours[-1]["trained"] == ours[-2]["trained"]  # the bad step
    assert ours[-1]["counted"] == [5, 1]
    trained = [steps["trained"] for steps in ours[:5]]
    assert all(a != b for a, b in itertools.pairwise(trained))


def test_every_companion_of_an_optimizer_goes_by_the_whole_batch():
    names = ["averages", "weight decay", "constraint", "nested", "nested twice"]
    for ours, plain in run(*(["companion", {"name": name}] for name in names)):
        assert_like_a_plain_optimizer(ours, plain)


@pytest.mark.keras("3.15.1")
def test_so_do_several_optimizers_in_one():
    ((ours, plain),) = run(["companion", {"name": "several"}])
    assert_like_a_plain_optimizer(ours, plain)


def test_every_schedule_moves_as_on_one_device():
    names = ["fixed", "none", "growing", "log max", "underflow"]
    for ours, one in run(*(["schedule", {"name": name}] for name in names)):
        assert_like_one_device(ours, one)
        for replicas, device in zip(ours, one, strict=True):
            assert replicas["own"][0] == device["own"][0]
            assert replicas["counted"] == device["counted"]
        assert ours[-1]["counted"] == [6, 1]
        assert ours[4]["trained"] == ours[3]["trained"]  # the bad step


def test_an_optimizer_that_its_first_step_builds_and_steps_that_are_refused():
    # Collectives of eager code clash with those of a graph before it: what is unbuilt comes first.
    unbuilt, refused = run(["unbuilt", {}], ["refusals", {}])
    assert unbuilt == [[[-0.5]] * 2, [1, 1]]
    (cross_replica, unknown, outside), before, after = refused
    assert "cannot know whether its gradients are unscaled" in outside
    assert "no replica whose gradients" in cross_replica
    assert "inside the function that you give to strategy.run()" in cross_replica
    assert "sums gradients over replicas in a way that kerasmp does not know" in unknown
    assert f"Keras {keras.__version__}, optimizer SGD" in unknown
    assert before == after


PARTS, WHOLE = [[3.0, -1.0], [0.0, 5.0]], [3.0, 4.0]
CLIPPING = [{"global_clipnorm": 1.0}, {"clipnorm": 1.0}, {"clipvalue": 3.5}]
EACH = 2e38 / SCALE  # times the scale finite on each replica, but not the sum of both


@pytest.fixture(scope="module")
def results():
    clipped = [
        ["apply_once", {"parts": PARTS, "cls": cls} | setting]
        for cls in ("ours", "stock")
        for setting in CLIPPING
    ]
    both, cancelling, ours, stock, sparse, saving, *clipped = run(
        ["apply_once", {"parts": [[EACH, 0.0], [EACH, 1.0]]}],
        ["apply_once", {"parts": [[EACH, 0.0], [-EACH, 1.0]]}],
        ["sent", {"cls": "ours"}],
        ["sent", {"cls": "stock"}],
        ["sparse", {}],
        ["saving", {}],
        *clipped,
    )
    return {
        "overflow": (both, cancelling),
        "sent": (ours, stock),
        "sparse": sparse,
        "saving": saving,
        "clipped": [result["weight"] for result in clipped],
    }


def test_gradients_that_overflow_only_in_their_sum_are_skipped(results):
    both, cancelling = results["overflow"]
    assert both == {"weight": [0.0, 0.0], "skipped": 1}
    assert cancelling == {"weight": [0.0, -1.0], "skipped": 0}


def test_clipping_goes_by_the_gradient_of_the_whole_batch(results):
    ours, stock = results["clipped"][:3], results["clipped"][3:]
    one_device = []
    for setting in CLIPPING:
        weight = keras.Variable([0.0, 0.0])
        keras.optimizers.SGD(1.0, **setting).apply([ops.array(WHOLE)], [weight])
        one_device.append(ops.convert_to_numpy(weight))
    np.testing.assert_allclose(ours, one_device, rtol=1e-6)
    # Stock Keras clips each replica's share by itself, and adds up what is left of them.
    assert (np.abs(np.subtract(stock, one_device)).max(axis=1) > 0.1).all()


def test_gradients_cross_the_network_once_and_one_number_with_them(results):
    ours, stock = results["sent"]
    gradients = [[3, 2], [2], []]
    # Each replica calls once; the number says whether its loss was finite.
    assert ours[0] == [[*gradients, []]] * 2
    assert stock[0] == [gradients] * 2
    # Packed into one collective on each replica, as without us.
    assert ours[1] == stock[1] == ["CollectiveReduceV2"] * 2


def test_sparse_gradients_stay_sparse_and_are_skipped_together(results):
    table = np.array([[1.0, 2.0]] * 4)
    np.subtract.at(table, [0, 1, 0], [[0.5, 1.0]] * 3)
    np.subtract.at(table, [1, 3, 3], [[0.25, 0.5], [1.0, 0.0], [2.0, 4.0]])
    sparse = results["sparse"]
    assert sparse["tables"] == [[table.ravel().tolist()] * 2] * 2  # the second step was bad
    assert (sparse["seen"], sparse["skipped"]) == (["IndexedSlices"], 1)


def test_state_goes_on_after_files_and_checkpoints(results):
    saving = results["saving"]
    assert saving["counted"] == [4, 1]
    assert saving["saved"] == [saving["alone"]] * 2
    assert saving["later"] != saving["saved"]
    for way in ("built", "to be built", "loaded"):
        assert saving["restored"][way] == saving["saved"]
        assert saving["restored later"][way] == saving["later"]
