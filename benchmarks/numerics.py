"""Compares half precision with float64: stock Keras, kerasmp, and the best possible result.

Measures the hazards in tests/helpers/hazards.py on one backend, stores the errors in
docs/numerics.json with those of the other backends, and generates docs/numerics.md from all of
them. Each hazard is stored as soon as it is measured, so run one backend after the other.

    KERAS_BACKEND=tensorflow python benchmarks/numerics.py
    KERAS_BACKEND=tensorflow python benchmarks/numerics.py --dtype bfloat16
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tests use the same hazards

import keras
from helpers import gradients, measurements, numerics_page, precision
from helpers.float16 import HALVES
from helpers.hazards import BY_NAME, MEASURED

NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}


def measure(hazard, way, half):
    """Yield the errors of a hazard as plain data."""
    measured = precision.Measured(hazard, way, half)
    inputs = [(numerics_page.HAZARD, measured.arrays)]
    inputs += [
        (f"{std:g}", arrays)
        for std, arrays in zip(hazard.ordinary, hazard.ordinary_inputs(half), strict=True)
    ]
    for title, arrays in inputs:
        for part, rows in zip(("output", "gradient"), measured.rows(arrays), strict=True):
            for row in rows:
                yield {
                    "number": hazard.number,
                    "name": hazard.name,
                    "answer": hazard.answer,
                    "way": way,
                    "inputs": title,
                    "part": part,
                    "tensor": row.tensor,
                    "stock": plain(row.stock),
                    "ours": plain(row.ours),
                    "best": plain(row.best),
                }


def plain(error):
    if error is None:
        return None
    return "inf" if error == float("inf") else float(f"{error:.3g}")


def framework():
    backend = keras.backend.backend()
    version = importlib.import_module(backend).__version__
    return f"{NAMES[backend]} {version}"


def update(name, half):
    """Measure a hazard in one half precision, and replace its stored rows."""
    rows = []
    for way in gradients.WAYS:
        found = list(measure(BY_NAME[name], way, half))
        rows += found
        worst = max(map(numerics_page.ratio, found))
        print(f"{BY_NAME[name].number:3} {name:60} {half:8} {way:6} {worst:.1f}", flush=True)
    data = measurements.read(numerics_page.DATA)
    run = numerics_page.run(keras.backend.backend(), half)
    rows += [row for row in data.get(run, {"rows": []})["rows"] if row["name"] != name]
    listed = [each for each, measured_in in MEASURED if measured_in == half]
    rows = [row for row in rows if row["name"] in listed]
    data[run] = {
        "keras": keras.__version__,
        "framework": framework(),
        "allowed": precision.ALLOWED,
        "least": precision.LEAST[half],
        "rows": sorted(rows, key=lambda row: listed.index(row["name"])),
    }
    measurements.write(numerics_page.DATA, data, numerics_page.page(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hazards", nargs="*", help="parts of their names; default: all")
    parser.add_argument("--dtype", nargs="+", choices=HALVES, default=list(HALVES))
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.page_only:
        data = measurements.read(numerics_page.DATA)
        measurements.write(numerics_page.DATA, data, numerics_page.page(data))
        return
    for name, half in MEASURED:
        asked = not arguments.hazards or any(part in name for part in arguments.hazards)
        if asked and half in arguments.dtype:
            update(name, half)


if __name__ == "__main__":
    main()
