"""Measures the rows of docs/performance.md on one backend, and generates the page.

The rows are stored in docs/performance.json with those of other backends. Rows that are not
measured do not change.

    KERAS_BACKEND=tensorflow python benchmarks/performance.py
    KERAS_BACKEND=jax python benchmarks/performance.py update/adam step --rounds 60
    KERAS_BACKEND=torch python benchmarks/performance.py sparse --print-only
"""

import argparse
import gc
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tests use the same page

import interleaved
import keras
import model
import overhead
import update
from helpers import measurements, performance_page

BACKEND = keras.backend.backend()
PACKAGES = {
    "tensorflow": ["keras", "tensorflow", "tensorflow-cpu"],
    "jax": ["keras", "jax", "optax", "jmp", "flax"],
    "torch": ["keras", "torch"],
}
GROUPS = {
    "update": (update.variants, update.INNER),
    "step": (overhead.variants, overhead.NAMES),
    "model": (model.variants, model.NAMES),
}
WAYS = {
    "tensorflow": {"graph": False, "xla": True},
    "jax": {"jax": True},
    "torch": {"torch": False},
}
if BACKEND == "tensorflow":
    import memory
    import sparse

    GROUPS["sparse"] = sparse.variants, sparse.NAMES
    GROUPS["memory"] = memory.variants, memory.NAMES


def asked(names):
    """Yield the group, name and way of each requested row."""
    known = [f"{group}/{name}" for group, (_, names) in GROUPS.items() for name in names]
    unknown = [name for name in names if name not in {*GROUPS, *known}]
    if unknown:
        sys.exit(f"No row is called {', '.join(unknown)}. The rows are: {', '.join(known)}.")
    for each in names or GROUPS:  # in the requested order
        for row in known:
            group, name = row.split("/")
            for way in WAYS[BACKEND] if each in {group, row} else ():
                if not (group == "sparse" and way == "xla"):  # XLA has no sparse gradients
                    yield group, name, way


def row_of(group, name, way, rounds):
    """Measure a row and return it as plain data."""
    compared, counts = GROUPS[group][0](name, WAYS[BACKEND][way])
    times = interleaved.measure(compared, rounds) if compared else {}
    row = {"group": group, "name": name, "way": way, "rounds": rounds, "versions": versions()}
    return row | {"compared": interleaved.ratios(times) if times else {}, "counts": counts}


def machine():
    """Return the key under which rows are stored, and a description of the hardware."""
    gpu = None
    if BACKEND == "jax":
        import jax

        device = jax.devices()[0]
        gpu = device.device_kind if device.platform == "gpu" else None
    elif BACKEND == "torch":
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu:
        return f"{BACKEND}, {gpu}", gpu
    return BACKEND, f"{os.cpu_count()} CPU cores, {platform.machine()}"


def versions():
    found = importlib.metadata.distributions()
    installed = {each.name.lower().replace("_", "-"): each.version for each in found}
    return [f"{name} {installed[name]}" for name in PACKAGES[BACKEND] if name in installed]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="groups or GROUP/NAME; default: all")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--print-only", action="store_true", help="store nothing")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    data = measurements.read(performance_page.DATA)
    run, hardware = machine()
    rows = [] if arguments.page_only else list(asked(arguments.rows))
    for group, name, way in rows:
        row = row_of(group, name, way, arguments.rounds)
        print(f"{group}/{name}, {way}, {run}:{' ' * 20}")
        for label in row["compared"] or row["counts"]:
            found = row["compared"].get(label, {}), row["counts"].get(label, {})
            print(
                f"  {label:14}",
                *(f"{key} {value}" for kind in found for key, value in kind.items()),
            )
        keras.backend.clear_session()
        gc.collect()
        if arguments.print_only:
            continue
        kept = data.get(run, {"rows": []})["rows"]
        same = ("group", "name", "way")
        kept = [other for other in kept if any(other[key] != row[key] for key in same)]
        data[run] = {"hardware": hardware, "rows": [*kept, row]}
        measurements.write(performance_page.DATA, data, performance_page.page(data))
    if arguments.page_only:
        measurements.write(performance_page.DATA, data, performance_page.page(data))


if __name__ == "__main__":
    main()
