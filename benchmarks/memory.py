"""Measures the peak memory of an update besides weights, state and gradients, in new processes.

Only for TensorFlow, whose graphs have no memory analysis, and on Linux, which records the peak.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras

NAMES = ("adam", "clipped", "momentum")


def variants(name, jit):
    """Return no functions, and the counts by name."""
    command = [sys.executable, __file__, name, "jit" if jit else "graph"]
    # Return freed memory to the system, so that it does not count as held before the next step.
    # With oneDNN, TensorFlow uses an allocator that keeps it.
    freeing = {"MALLOC_MMAP_THRESHOLD_": "1000000", "TF_ENABLE_ONEDNN_OPTS": "0"}
    environment = os.environ | freeing
    counts = {}
    for label in ("plain", "stock", "kerasmp"):
        output = subprocess.check_output([*command, label], env=environment)  # noqa: S603 - this file
        counts[label] = {"MB held": round(float(output), 1)}
    return {}, counts


def held(name, way, label):
    """Return the peak memory of this process in a step, beyond its memory before, in megabytes."""
    import update

    optimizer = update.OPTIMIZERS[label](update.INNER[name]())
    step, _ = update.on_tensorflow(optimizer, way == "jit")
    step()  # traces, compiles, and allocates what stays
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1e3


def _status(key):
    """Return an entry of this process's status in Linux, in kB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    assert keras.backend.backend() == "tensorflow"
    print(held(*sys.argv[1:]))
