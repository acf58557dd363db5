"""JAX over four devices, and over two processes: one bad shard skips the step everywhere."""

import keras
import numpy as np
import pytest
from helpers import bad_batch, processes
from helpers.bad_batch import DATA, OVERFLOW

import kerasmp as mp

pytestmark = [pytest.mark.backend("jax"), pytest.mark.timeout(processes.SECONDS + 10)]

FIRST, MIDDLE, LAST = 0, bad_batch.ROWS // 2, bad_batch.ROWS - 1
CPU = {"JAX_PLATFORMS": "cpu"}
FOUR_DEVICES = CPU | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
GLOO = CPU | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def train(cases, *, devices=4, function="train", **more):
    env = CPU if devices == 1 else FOUR_DEVICES
    return processes.call(
        f"helpers.meshes:{function}", env=env, devices=devices, cases=cases, **more
    )


def in_two_processes(cases, **more):
    first, second = processes.cluster(
        "helpers.meshes:train_in_cluster", 2, env=GLOO, cases=cases, **more
    )
    assert first == second
    return first


def alone():
    """Return the weights after the same training in this process without a bad batch."""
    model = bad_batch.network()
    inner = keras.optimizers.Adam(0.1)
    model.compile(mp.LossScaleOptimizer(inner, initial_scale=bad_batch.SCALE), "mse")
    x = np.concatenate(bad_batch.batches())
    model.fit(x, bad_batch.targets(x), batch_size=bad_batch.ROWS, shuffle=False, verbose=0)
    return bad_batch.outcome(model, model.optimizer)["weights"]


def overflows(*rows):
    """Return cases: no bad batch, then one with the bad value in each of `rows`."""
    return [None, *((OVERFLOW, row) for row in rows)]


def assert_skipped(clean, *bad, scale=bad_batch.SCALE / 2):
    assert np.isfinite(clean["weights"]).all()
    assert (clean["skipped"], clean["applied"]) == (0, 4)
    for run in bad:
        assert run["weights"] == clean["weights"]
        assert (run["skipped"], run["applied"], run["scale"]) == (1, 4, scale)


@pytest.mark.full
@pytest.mark.parametrize("how", ["data", "model"])
def test_a_bad_row_on_any_device_is_skipped_on_all(how):
    assert_skipped(*train(overflows(FIRST, MIDDLE, LAST), how=how))


@pytest.mark.full
def test_a_bad_row_on_any_device_is_skipped_on_all_in_a_user_defined_loop():
    cases = overflows(FIRST, MIDDLE, LAST)
    four = train(cases, function="loop")
    assert_skipped(*four)
    (alone,) = train([None], function="loop", devices=1)
    np.testing.assert_allclose(four[0]["weights"], alone["weights"], atol=2e-3)


BAD_DATA = [None, (DATA, FIRST), (DATA, LAST)]


def test_a_kerasmp_model_keeps_nothing_of_bad_data():
    # The cause is known to be the loss: the scale stays.
    assert_skipped(*train(BAD_DATA, how="data", guarded=True), scale=bad_batch.SCALE)


@pytest.mark.full
def test_a_kerasmp_model_with_its_own_train_step_keeps_nothing_of_bad_data():
    own_step = train(BAD_DATA[1:], how="data", guarded=True, own_step=True)
    assert own_step[0]["weights"] == own_step[1]["weights"]
    assert all(np.isfinite(run["weights"]).all() for run in own_step)


@pytest.mark.full
def test_clipping_and_sums_go_by_the_whole_batch():
    # Each row alone has finite gradients; their sum over two shards overflows.
    value = 22.0
    cases = [None, (value, FIRST), (value, LAST), (value, [FIRST, LAST])]
    four = train(cases, how="data", clipped=0.5)
    assert [run["skipped"] for run in four] == [0, 0, 0, 1]
    alone = train(cases, how="data", clipped=0.5, devices=1)
    for sharded, whole in zip(four, alone, strict=True):
        np.testing.assert_allclose(sharded["weights"], whole["weights"], atol=2e-3)


def test_a_bad_row_in_either_of_two_processes_is_skipped_in_both():
    two = in_two_processes(overflows(FIRST, LAST))
    assert_skipped(*two)
    # float16 sums over twice four rows differ from sums over eight.
    np.testing.assert_allclose(two[0]["weights"], alone(), atol=2e-3)


@pytest.mark.full
def test_a_kerasmp_model_over_two_processes_keeps_nothing_of_bad_data():
    assert_skipped(*in_two_processes(BAD_DATA, guarded=True), scale=bad_batch.SCALE)
