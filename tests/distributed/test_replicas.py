"""Two replicas of MirroredStrategy equal one device with the whole batch.

What one of them cannot use, none uses.
"""

import itertools

import keras
import numpy as np
import pytest
from helpers import processes
from helpers.bad_batch import DATA, OVERFLOW, SCALE, assert_skipped_everywhere
from keras import ops

pytestmark = [pytest.mark.backend("tensorflow"), pytest.mark.timeout(processes.SECONDS + 10)]


def run(*cases):
    """Start TensorFlow once for all cases, since starting takes longer than they do."""
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


PARTS, WHOLE = [[3.0, -1.0], [0.0, 5.0]], [3.0, 4.0]
CLIPPING = [{"global_clipnorm": 1.0}, {"clipnorm": 1.0}, {"clipvalue": 3.5}]
EACH = 2e38 / SCALE  # times the scale finite on each replica, but not the sum of both


def clipped(cls, setting):
    return ["apply_once", {"parts": PARTS, "cls": cls} | setting]


# The quick set: one of each kind.
QUICK = {
    # Eager collectives clash with those of an earlier graph: the unbuilt case comes first.
    "unbuilt": ["unbuilt", {}],
    "loop": ["train", {"way": "loop", "value": OVERFLOW}],
    # The weights hold BatchNormalization's statistics.
    "data": ["train", {"way": "fit", "value": DATA, "guarded": True}],
    "refusals": ["refusals", {}],
    "both": ["apply_once", {"parts": [[EACH, 0.0], [EACH, 1.0]]}],
    "cancelling": ["apply_once", {"parts": [[EACH, 0.0], [-EACH, 1.0]]}],
    "clipped": clipped("ours", CLIPPING[0]),
    "schedule": ["schedule", {"name": "growing"}],
    "sparse": ["sparse", {}],
}


@pytest.fixture(scope="module")
def quick():
    return dict(zip(QUICK, run(*QUICK.values()), strict=True))


def test_one_bad_replica_any_of_both_is_skipped_on_both(quick):
    assert_skipped_everywhere(quick["loop"], 2)


def test_one_bad_replica_is_skipped_on_both_in_fit_of_a_kerasmp_model(quick):
    assert_skipped_everywhere(quick["data"], 2, SCALE)  # the scale stays


@pytest.mark.full
def test_every_setting_of_the_inner_optimizer_acts_on_the_whole_batch():
    names = ["averages", "weight decay", "constraint", "nested", "nested twice"]
    for ours, plain in run(*(["companion", {"name": name}] for name in names)):
        assert_like_a_plain_optimizer(ours, plain)


@pytest.mark.full
@pytest.mark.keras("3.15.1")
def test_several_optimizers_in_one_act_on_the_whole_batch():
    ((ours, plain),) = run(["companion", {"name": "several"}])
    assert_like_a_plain_optimizer(ours, plain)


def assert_moves_as_on_one_device(ours, one):
    assert_like_one_device(ours, one)
    for replicas, device in zip(ours, one, strict=True):
        assert replicas["own"][0] == device["own"][0]
        assert replicas["counted"] == device["counted"]
    assert ours[-1]["counted"] == [6, 1]
    assert ours[4]["trained"] == ours[3]["trained"]  # the bad step


@pytest.mark.full
def test_every_schedule_moves_as_on_one_device():
    names = ["fixed", "none", "log max", "underflow"]
    for ours, one in run(*(["schedule", {"name": name}] for name in names)):
        assert_moves_as_on_one_device(ours, one)


def test_the_usual_schedule_moves_as_on_one_device(quick):
    assert_moves_as_on_one_device(*quick["schedule"])


def test_an_optimizer_may_be_built_by_its_first_step(quick):
    assert quick["unbuilt"] == [[[-0.5]] * 2, [1, 1]]


def test_steps_that_are_refused(quick):
    (cross_replica, unknown, outside), before, after = quick["refusals"]
    assert "cannot know whether its gradients are unscaled" in outside
    assert "called outside of a replica" in cross_replica
    assert "inside the function that you pass to strategy.run()" in cross_replica
    assert "sums gradients over replicas in an unknown way" in unknown
    assert f"Keras {keras.__version__}, optimizer SGD" in unknown
    assert before == after


def one_device(setting):
    weight = keras.Variable([0.0, 0.0])
    keras.optimizers.SGD(1.0, **setting).apply([ops.array(WHOLE)], [weight])
    return ops.convert_to_numpy(weight)


def test_gradients_that_overflow_only_in_their_sum_are_skipped(quick):
    assert quick["both"] == {"weight": [0.0, 0.0], "skipped": 1}
    assert quick["cancelling"] == {"weight": [0.0, -1.0], "skipped": 0}


def test_clipping_by_norm_uses_the_gradient_of_the_whole_batch(quick):
    np.testing.assert_allclose(quick["clipped"]["weight"], one_device(CLIPPING[0]), rtol=1e-6)


@pytest.fixture(scope="module")
def results():
    ours, stock, saving, *weights = run(
        ["sent", {"cls": "ours"}],
        ["sent", {"cls": "stock"}],
        ["saving", {}],
        *(clipped(cls, setting) for cls in ("ours", "stock") for setting in CLIPPING),
    )
    return {
        "sent": (ours, stock),
        "saving": saving,
        "clipped": [result["weight"] for result in weights],
    }


@pytest.mark.full
def test_every_other_clipping_uses_the_gradient_of_the_whole_batch(results):
    ours, stock = results["clipped"][:3], results["clipped"][3:]
    expected = [one_device(setting) for setting in CLIPPING]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    # Stock Keras clips the share of each replica and then sums the results.
    assert (np.abs(np.subtract(stock, expected)).max(axis=1) > 0.1).all()


@pytest.mark.full
def test_gradients_and_one_number_are_all_reduced_once(results):
    ours, stock = results["sent"]
    gradients = [[3, 2], [2], []]
    # Each replica calls once; the number says whether its loss was finite.
    assert ours[0] == [[*gradients, []]] * 2
    assert stock[0] == [gradients] * 2
    # Packed into one collective on each replica, as without kerasmp.
    assert ours[1] == stock[1] == ["CollectiveReduceV2"] * 2


def test_sparse_gradients_stay_sparse_and_are_skipped_together(quick):
    table = np.array([[1.0, 2.0]] * 4)
    np.subtract.at(table, [0, 1, 0], [[0.5, 1.0]] * 3)
    np.subtract.at(table, [1, 3, 3], [[0.25, 0.5], [1.0, 0.0], [2.0, 4.0]])
    sparse = quick["sparse"]
    assert sparse["tables"] == [[table.ravel().tolist()] * 2] * 2  # the second step was bad
    assert (sparse["seen"], sparse["skipped"]) == (["IndexedSlices"], 1)


@pytest.mark.full
def test_training_continues_from_files_and_checkpoints(results):
    saving = results["saving"]
    assert saving["counted"] == [4, 1]
    assert saving["saved"] == [saving["alone"]] * 2
    assert saving["later"] != saving["saved"]
    for way in ("built", "to be built", "loaded"):
        assert saving["restored"][way] == saving["saved"]
        assert saving["restored later"][way] == saving["later"]
