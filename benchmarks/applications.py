"""Every architecture of `keras.applications`: converted to float16, trained a step, and back.

One process each, so that memory is free again. Writes benchmarks/applications.md after each.

    KERAS_BACKEND=tensorflow python benchmarks/applications.py
    KERAS_BACKEND=tensorflow python benchmarks/applications.py ResNet50 NASNetLarge --output some.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tests check the same

import keras
from helpers import applications

TITLE = "Every architecture of keras.applications"
ABOUT = """Made by [applications.py](applications.py): {framework}, Keras {keras}, on {where}.

Each architecture, untrained, with the statistics of BatchNormalization taken from {calibrated}
photographs: {size} x {size} pixels ({larger} where that is too small), {classes} classes, a batch
of {batch}. It is converted to `mixed_float16` with the rules "safe".

- *float16, float32*: how many layers compute in each.
- *Error*: how far the logits are from float32, in norm, relative. Beside it, what comes from
  rounding weights and inputs to float16 and computing in float32: no float16 can do without that.
- *Scale*: the largest of {scales} with which a step of SGD is not skipped. Nothing is trained yet,
  so gradients are large.
- *Back*: predictions are those of before, bit for bit, after `restore()`, and after training,
  `convert(model, "float32")` and putting the weights back.
- *Seconds*: for all of it, float16 being several times slower than float32 on a CPU.

"""
COLUMNS = ["Pixels", "Parameters", "float16", "float32", "Error", "Rounding alone", "Scale"]
COLUMNS = ["Architecture", *COLUMNS, "Skipped", "Back", "Seconds"]
HEADER = f"| {' | '.join(COLUMNS)} |\n|---|{'--:|' * 7}---|---|--:|\n"
ONE = """
import json, sys
sys.path.insert(0, {tests!r})
from helpers import applications
print("RESULT" + json.dumps(applications.check({name!r})))
"""


def measure(name, limit):
    """Return the result of an architecture, or a text that says what went wrong."""
    code = ONE.format(tests=sys.path[0], name=name)
    try:
        done = subprocess.run(  # noqa: S603 - this file's own text
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return f"longer than {limit} seconds"
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no result"])[-1]
    return applications.Result(*json.loads(lines[-1].removeprefix("RESULT")))


def row(name, result):
    """Return a line of the table."""
    if isinstance(result, str):
        return f"| {name} | {result.replace('|', '/')} " + "| " * 9 + "|"
    cells = (
        name,
        result.size,
        f"{result.parameters:,}",
        result.float16,
        result.float32,
        f"{result.error:.1e}",
        f"{result.rounded:.1e}",
        f"{result.scale:g}",
        "yes" if result.skipped else "no",
        "yes" if result.restored and result.converted_back else "NO",
        f"{result.seconds:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def about():
    backend = keras.backend.backend()
    framework = __import__(backend)
    return ABOUT.format(
        framework=f"{backend} {framework.__version__}",
        keras=keras.__version__,
        where=f"{os.cpu_count()} cores of {platform.machine()}",
        calibrated=applications.CALIBRATED_ON,
        size=applications.SIZE,
        larger=applications.LARGER,
        batch=applications.BATCH,
        classes=applications.CLASSES,
        scales=", ".join(f"{scale:g}" for scale in applications.SCALES),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    parser.add_argument("--limit", type=int, default=900, help="seconds for each")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    names = arguments.names or sorted(chain(*applications.architectures().values()))
    rows, started = [], time.monotonic()
    for number, name in enumerate(names, 1):
        rows.append(row(name, measure(name, arguments.limit)))
        print(f"{number}/{len(names)}, {time.monotonic() - started:.0f} s {rows[-1]}", flush=True)
        text = f"# {TITLE}\n\n{about()}{HEADER}" + "\n".join(rows) + "\n"
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
