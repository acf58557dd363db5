"""Measures `convert` of ResNet50 from `keras.applications`, with and without safe layers.

To compare several versions of kerasmp, pass their folders. They run in turns, each with a new model
in a new process:

    KERAS_BACKEND=tensorflow python benchmarks/convert.py OLD NEW
"""

import json
import os
import statistics
import subprocess
import sys
import time

import keras

import kerasmp as mp

WAYS = {"stock layers": {}, "safe layers": {"safe_layers": True}}
ROUNDS = 7


def seconds(how):
    mp.convert(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), **how)  # imports
    model = keras.applications.ResNet50(weights=None)
    start = time.process_time()
    mp.convert(model, **how)
    return time.process_time() - start


if len(sys.argv) == 1:
    print(json.dumps({way: seconds(how) for way, how in WAYS.items()}))
found = {tree: [] for tree in sys.argv[1:]}
for tree in list(found) * ROUNDS:
    command, there = [sys.executable, __file__], {**os.environ, "PYTHONPATH": tree}
    found[tree].append(json.loads(subprocess.check_output(command, env=there).splitlines()[-1]))  # noqa: S603 - this file
for way in WAYS:
    medians = {tree: statistics.median(each[way] for each in found[tree]) for tree in found}
    for tree, taken in medians.items():
        print(f"{way:12s} {1000 * taken:6.1f} ms of CPU  {tree}")
