"""JAX over four devices, and over two processes: one bad shard skips the step everywhere."""

import numpy as np
import pytest
from helpers import bad_batch, processes

pytestmark = pytest.mark.backend("jax")

OVERFLOW, DATA = 3000.0, float("inf")  # a finite loss whose gradient overflows; a loss that is inf
FIRST, MIDDLE, LAST = 0, bad_batch.ROWS // 2, bad_batch.ROWS - 1
FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
GLOO = {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def train(how, value, bad_rows, env=FOUR_DEVICES, devices=4, **more):
    env = env | {"JAX_PLATFORMS": "cpu"}
    return processes.call(
        "helpers.meshes:train",
        env=env,
        devices=devices,
        how=how,
        value=value,
        bad_rows=bad_rows,
        **more,
    )


def assert_skipped(clean, bad, scale):
    assert np.isfinite(clean["weights"]).all()
    assert (clean["skipped"], clean["applied"]) == (0, 4)
    for run in bad:
        assert run["weights"] == clean["weights"]
        assert (run["skipped"], run["applied"], run["scale"]) == (1, 4, scale)


@pytest.mark.parametrize("how", ["data", "model"])
def test_a_bad_row_on_any_device_is_skipped_on_all(how):
    clean, *bad = train(how, OVERFLOW, [None, FIRST, MIDDLE, LAST])
    assert_skipped(clean, bad, bad_batch.SCALE / 2)


def test_a_kerasmp_model_skips_bad_data_with_all_its_traces():
    clean, *bad = train("data", DATA, [None, FIRST, LAST], guarded=True)
    assert_skipped(clean, bad, bad_batch.SCALE)  # known to be the loss: the scale stays


def test_a_bad_row_in_either_of_two_processes_is_skipped_in_both():
    env = GLOO | {"JAX_PLATFORMS": "cpu"}
    first, second = processes.cluster(
        "helpers.meshes:train_in_cluster", 2, env=env, value=OVERFLOW, bad_rows=[None, FIRST, LAST]
    )
    assert first == second
    assert_skipped(first[0], first[1:], bad_batch.SCALE / 2)
    (alone,) = train("data", OVERFLOW, [None], env={}, devices=1)
    # float16 sums over four rows and four rows are not those over eight.
    np.testing.assert_allclose(first[0]["weights"], alone["weights"], atol=2e-3)
