"""Replicas agree before they branch: a bad shard on one of them is skipped on all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.backend("tensorflow")

TESTS = Path(__file__).parent.parent


def _run(*arguments):
    """Run the scenario in a process of its own: logical devices are set before any other use."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.two_replicas", *arguments],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module", params=["loop", "unscaling", "fit"])
def ours(request):
    return _run("ours", request.param)


def test_only_the_second_replicas_shard_overflows_and_all_skip(ours):
    """Fault 1."""
    assert ours["weights"] == ours["weights_without_the_bad_batch"]
    assert np.isfinite(ours["weights"]).all()
    assert ours["skipped"] == 1
    assert ours["applied"] == 4


def test_every_replica_holds_the_same_scale_and_counters(ours):
    assert ours["scale"] == 2.0**14
    assert len(ours["copies"]) == 2
    assert ours["copies"][0] == ours["copies"][1]


def test_gradients_that_each_replica_unscales_make_the_same_update():
    assert _run("ours", "unscaling")["weights"] == _run("ours", "loop")["weights"]


def test_stock_keras_applies_the_bad_shard_and_destroys_the_weights():
    stock = _run("stock", "loop")
    assert np.isfinite(stock["weights_without_the_bad_batch"]).all()
    assert not np.isfinite(stock["weights"]).all()
