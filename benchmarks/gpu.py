"""Measures rows of docs/performance.md on one NVIDIA GPU, with JAX and torch, in eight minutes.

First it checks that steps are correct there: applied as by the plain optimizer, or skipped as a
whole. Then it stores the rows with those of other machines, and generates the page again.

    python benchmarks/gpu.py
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 8 * 60  # seconds
SHARE = {"jax": 0.5, "torch": 0.9}  # the share of the limit at which a backend must be done
MEASURE = Path(__file__).with_name("performance.py")


def check():
    """Fail unless this backend runs on a GPU, updates like the plain optimizer, and skips steps."""
    import keras
    import numpy as np

    import kerasmp as mp

    def trained(optimizer, scale, factors):
        weights = [keras.Variable(np.ones((300, 200), "float32")) for _ in range(3)]
        optimizer.build(weights)
        for factor in factors:
            grads = np.random.default_rng(0).normal(size=(3, 300, 200)).astype("float32")
            optimizer.apply([keras.ops.array(g * factor * scale) for g in grads], weights)
        return [keras.ops.convert_to_numpy(weight) for weight in weights]

    plain = trained(keras.optimizers.Adam(0.1), 1.0, [1.0, 2.0])
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.1), loss_scale=2.0**10)
    scaled = trained(optimizer, 2.0**10, [1.0, float("inf"), 2.0])
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (2, 1)
    device = str(keras.ops.array(0.0).device)
    assert "cuda" in device.lower(), f"computed on {device}"


def run(backend, command, until):
    """Run a Python command on a backend, and return whether it succeeded in time."""
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, *command]
    left = max(1.0, until - time.monotonic())
    try:
        found = subprocess.run(command, env=environment, timeout=left, check=False)  # noqa: S603 - this file
    except subprocess.TimeoutExpired:
        print(f"{backend}: out of time. The rows measured so far are stored.")
        return False
    return found.returncode == 0


def main():
    started = time.monotonic()
    failed = False
    for backend, share in SHARE.items():
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed, so nothing is measured.")
            failed = True
            continue
        until = started + share * LIMIT
        if not run(backend, [__file__, "check"], until):
            print(f"{backend}: a step is wrong, or there is no GPU, so nothing is measured.")
            failed = True
            continue
        rows = ["update", "step/transformer", "step/mlp", "model/transformer", "model/mlp"]
        failed = not run(backend, [str(MEASURE), *rows, "--rounds", "30"], until) or failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(check() if sys.argv[1:] == ["check"] else main())
