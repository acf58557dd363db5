"""The rows of docs/performance.md on one NVIDIA GPU, with JAX and torch: in under eight minutes.

First whether a step is right there: applied as by the plain optimizer, and skipped as a whole. What
is measured is kept beside the rows of other machines, and the page made anew.

    python benchmarks/gpu.py
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 8 * 60  # seconds
SHARE = {"jax": 0.5, "torch": 0.9}  # of the limit, at which a backend has to be done
MEASURE = Path(__file__).with_name("performance.py")


def check():
    """Fail unless this backend computes on a GPU, applies what the plain one does, and skips."""
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
    ours = trained(optimizer, 2.0**10, [1.0, float("inf"), 2.0])
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (2, 1)
    device = str(keras.ops.array(0.0).device)
    assert "cuda" in device.lower(), f"computed on {device}"


def run(backend, command, until):
    """Run Python on a backend; return whether it succeeded in time."""
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, *command]
    left = max(1.0, until - time.monotonic())
    try:
        found = subprocess.run(command, env=environment, timeout=left, check=False)  # noqa: S603 - ourselves
    except subprocess.TimeoutExpired:
        print(f"{backend}: out of time; the rows that were measured are kept.")
        return False
    return found.returncode == 0


def main():
    started = time.monotonic()
    failed = False
    for backend, share in SHARE.items():
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed; nothing is measured.")
            failed = True
            continue
        until = started + share * LIMIT
        if not run(backend, [__file__, "check"], until):
            print(f"{backend}: a step is wrong here, or there is no GPU; nothing is measured.")
            failed = True
            continue
        rows = ["update", "step/transformer", "step/mlp", "model/transformer", "model/mlp"]
        failed = not run(backend, [str(MEASURE), *rows, "--rounds", "30"], until) or failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(check() if sys.argv[1:] == ["check"] else main())
