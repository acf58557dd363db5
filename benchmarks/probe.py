"""Measures the probe of a batch beside two predictions: one in half precision, one in float32.

With `--diagnose`, it measures `diagnose` beside two training steps instead.

The probe and both predictions or steps run eagerly, in turns, in one process for each network.
Times are medians of wall / CPU seconds. The first `predict` of a new model, which compiles, is
beside them.

    KERAS_BACKEND=tensorflow python benchmarks/probe.py
    KERAS_BACKEND=torch python benchmarks/probe.py mlp "ResNet50, 64" --dtype bfloat16

With `--memory` it shows the peak memory of one prediction or step in float32 and of the probe
instead, each in a new process, on Linux: that of the whole process, and in brackets what it adds to
the memory after the model was built. Targets: the time of 2 predictions, 1.5 times the memory of
one; for `diagnose` 3 times the time of both steps, 2.5 times the memory of one.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import interleaved
import keras
import numpy as np
from overhead import transformer

from kerasmp import LossScaleOptimizer, diagnose, policy_scope
from kerasmp.probe import probe_findings


def mlp():
    hidden = [keras.layers.Dense(1024, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((1024,)), *hidden, keras.layers.Dense(10)])


def resnet(size):
    return lambda: keras.applications.ResNet50(weights=None, input_shape=(size, size, 3))


# Network, shape of an input, number of words (None: floats), batch, half precision.
CASES = {
    "mlp": (mlp, (1024,), None, 256, "float16"),
    "transformer": (lambda: transformer(width=256, depth=4), (32,), 2000, 32, "float16"),
    "ResNet50, 64": (resnet(64), (64, 64, 3), None, 8, "float16"),
    "ResNet50, 224": (resnet(224), (224, 224, 3), None, 8, "bfloat16"),
}
ROUNDS = 5
TIMES = ("network", "dtype", "both", "probe", "ratio", "first predict", "findings")
MEMORY = ("network", "dtype", "one in float32", "probe", "ratio")


def built(name, policy):
    """Return a network under a policy, and a batch."""
    build, shape, words, batch, _ = CASES[name]
    rng, size = np.random.default_rng(0), (batch, *shape)
    x = rng.integers(0, words, size) if words else rng.normal(size=size).astype("float32")
    keras.utils.set_random_seed(0)
    with policy_scope(policy):
        return build(), x


def predicting(model, x):
    """Return a function that predicts a batch eagerly, and waits for the outputs."""

    def run():
        # torch: without gradients, as in `predict`
        with no_gradients():
            keras.ops.convert_to_numpy(keras.ops.cast(model(x, training=False), "float32"))

    return run


def stepping(model, x):
    """Return a function that takes a training step eagerly."""
    y = targets(model, x)
    return lambda: model.train_on_batch(x, y)


def targets(model, x):
    """Compile a model, and return targets."""
    model.compile(LossScaleOptimizer("adam"), "mse", run_eagerly=True)
    return np.zeros((len(x), *model.output_shape[1:]), "float32")


def probing(model, x, *, steps):
    """Return a function that probes a batch, or diagnoses a step, and returns the findings."""
    if not steps:
        return lambda: probe_findings(model, x)
    y = targets(model, x)
    return lambda: diagnose(model, x, y).findings


def no_gradients():
    from contextlib import nullcontext

    if keras.backend.backend() != "torch":
        return nullcontext()
    import torch

    return torch.no_grad()


def timed(name, half, *, steps):
    """Return the cells of a row: the probe beside two predictions or steps."""
    run = stepping if steps else predicting
    in_half = run(*built(name, f"mixed_{half}"))
    in_float32 = run(*built(name, "float32"))
    probe = probing(*built(name, f"mixed_{half}"), steps=steps)
    found = probe()
    compared = {"both": lambda: (in_half(), in_float32()), "probe": probe}
    times = interleaved.measure(compared, ROUNDS)
    x, start = built(name, "float32")[1], time.perf_counter()
    built(name, f"mixed_{half}")[0].predict(x, batch_size=len(x), verbose=0)
    first = time.perf_counter() - start
    ratio = interleaved.ratios(times)["probe"]
    return [
        *(_pair(*map(statistics.median, zip(*times[each], strict=True))) for each in compared),
        _pair(ratio["wall"][1], ratio["cpu"][1]),
        f"{first:.2f}",
        str(len(found)),
    ]


def _pair(wall, cpu):
    return f"{wall:.2f} / {cpu:.2f}"


def peak(name, half, action, *, steps):
    """Return this process's peak memory in megabytes, and what an action adds to what it held."""
    if action == "probe":
        run = probing(*built(name, f"mixed_{half}"), steps=steps)
    else:
        run = (stepping if steps else predicting)(*built(name, "float32"))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = _status("VmRSS")
    run()
    return _status("VmHWM") / 1e3, (_status("VmHWM") - before) / 1e3


def _status(key):
    """Return an entry of this process's status in Linux, in kB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def remembered(name, half, *, steps):
    """Return the cells of a row: the memory of the probe beside that of a prediction or step."""
    found = [in_new_process(name, half, each, steps=steps) for each in ("one", "probe")]
    (one, added), (probe, probe_added) = found
    cells = [f"{total:.0f} ({more:.0f}) MB" for total, more in found]
    return [*cells, f"{probe / one:.2f} ({probe_added / added:.2f})"]


def in_new_process(name, half, action, *, steps):
    """Return the result of an action in a new process."""
    # oneDNN is slow in float16, and may hang. Without it TensorFlow sums bfloat16 in bfloat16.
    onednn = "0" if half == "float16" else "1"
    done = subprocess.run(  # noqa: S603 - this file
        [sys.executable, __file__, name, "--dtype", half, "--in-process", action]
        + ["--diagnose"] * steps,
        env={"TF_ENABLE_ONEDNN_OPTS": onednn} | os.environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="of all networks")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--diagnose", action="store_true")
    parser.add_argument("--in-process", choices=("time", "one", "probe"), help="internal")
    arguments = parser.parse_args()
    if arguments.in_process:
        action, (name,), half = arguments.in_process, arguments.names, arguments.dtype
        steps = arguments.diagnose
        is_time = action == "time"
        cells = timed(name, half, steps=steps) if is_time else peak(name, half, action, steps=steps)
        print(json.dumps(cells))
        return
    columns = MEMORY if arguments.memory else TIMES
    print(f"{keras.backend.backend()}, Keras {keras.__version__}, {os.cpu_count()} cores")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in arguments.names or CASES:
        half = arguments.dtype or CASES[name][4]
        run = remembered if arguments.memory else functools.partial(in_new_process, action="time")
        cells = run(name, half, steps=arguments.diagnose)
        print(f"| {' | '.join([name, half, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
