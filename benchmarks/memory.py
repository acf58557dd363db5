"""The most memory that an update takes beside weights, state and gradients: fresh processes.

On TensorFlow, whose graph has no count of it; on Linux, which says what a process has held.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras

NAMES = ("adam", "clipped", "momentum")


def variants(name, jit):
    """Return nothing to run, and what was counted, by name."""
    command = [sys.executable, __file__, name, "jit" if jit else "graph"]
    # What is given back goes to the system, and does not count as held before the next step. Where
    # TensorFlow finds a CPU that suits oneDNN, an allocator of its own would keep it.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "1000000", "TF_ENABLE_ONEDNN_OPTS": "0"}
    environment = os.environ | given_back
    counts = {}
    for label in ("plain", "stock", "kerasmp"):
        said = subprocess.check_output([*command, label], env=environment)  # noqa: S603 - ourselves
        counts[label] = {"MB held": round(float(said), 1)}
    return {}, counts


def held(name, way, label):
    """Return the megabytes that the process holds at its peak in a step, beyond those before."""
    import update

    optimizer = update.OPTIMIZERS[label](update.INNER[name]())
    step, _ = update.on_tensorflow(optimizer, way == "jit")
    step()  # traces, compiles, and makes what stays
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1e3


def _status(key):
    """Return a line of what Linux says of this process, in kB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    assert keras.backend.backend() == "tensorflow"
    print(held(*sys.argv[1:]))
