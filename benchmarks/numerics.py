"""How far float16 layers are from float64: stock Keras, kerasmp, and the best that can be had.

Measures tests/helpers/hazards.py on one backend, keeps the errors in docs/numerics.json beside
those of the other backends, and makes docs/numerics.md from all of them.

    KERAS_BACKEND=tensorflow python benchmarks/numerics.py
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tests hold the same hazards

import keras
from helpers import gradients, measurements, numerics_page, precision
from helpers.hazards import HAZARDS

NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}


def measure(hazard, way):
    """Yield the errors of a hazard as plain data."""
    measured = precision.Measured(hazard, way)
    inputs = [(numerics_page.HAZARD, measured.arrays)]
    inputs += [
        (f"{std:g}", arrays)
        for std, arrays in zip(hazard.ordinary, hazard.ordinary_inputs(), strict=True)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    data = measurements.read(numerics_page.DATA)
    if not arguments.page_only:
        rows = []
        for hazard in HAZARDS:
            for way in gradients.WAYS:
                found = list(measure(hazard, way))
                rows += found
                worst = max(map(numerics_page.ratio, found))
                print(f"{hazard.number:3} {hazard.name:60} {way:6} {worst:.1f}", flush=True)
        data[keras.backend.backend()] = {
            "keras": keras.__version__,
            "framework": framework(),
            "allowed": precision.ALLOWED,
            "least": precision.LEAST,
            "rows": rows,
        }
    measurements.write(numerics_page.DATA, data, numerics_page.page(data))


if __name__ == "__main__":
    main()
