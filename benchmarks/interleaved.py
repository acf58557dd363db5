"""Measures ratios of times: the variants run in turns, in random order, in one process.

Absolute times mean little on a shared machine. The median over all rounds of the ratio to the first
variant, in the same round, is stable.
"""

import math
import os
import platform
import random
import statistics
import time

import keras

AGAIN = "again"  # a second copy of the first variant, which shows the noise


def measure(compared, rounds):
    """Return wall and CPU seconds of each function in each round.

    Args:
        compared: Dict of names and functions without arguments. The first one is the baseline. An
            extra round at the start, which compiles, does not count.
        rounds: How often each function runs.
    """
    times = {name: [] for name in compared}
    for number in range(rounds + 1):
        order = list(compared)
        random.Random(number).shuffle(order)  # noqa: S311 - an order, not a secret
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            compared[name]()
            if number:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        print(f"round {number} of {rounds}", end="\r", flush=True)
    return times


def ratios(times):
    """Return, for each name, the ratios of wall and CPU time: the median and its interval.

    The interval is a 95 % confidence interval of the median (order statistics of a sign test), for
    any distribution.
    """
    first = next(iter(times.values()))
    return {
        name: {
            kind: _median([one[i] / base[i] for one, base in zip(taken, first, strict=True)])
            for i, kind in enumerate(("wall", "cpu"))
        }
        for name, taken in times.items()
    }


def _median(values):
    values = sorted(values)
    below = max(0, math.floor(len(values) / 2 - 0.98 * math.sqrt(len(values))))
    found = values[below], statistics.median(values), values[-1 - below]
    return [round(value, 3) for value in found]


def report(title, times):
    """Print, for each name, the median ratios of wall time / CPU time."""
    print(f"{title}: {keras.backend.backend()}, Keras {keras.__version__}", end=", ")
    print(f"{os.cpu_count()} cores, {platform.machine()}")
    for name, found in ratios(times).items():
        (_, wall, _), (low, cpu, high) = found["wall"], found["cpu"]
        print(f"  {name:34s} {wall:5.2f} / {cpu:5.2f}  ({low:.2f} to {high:.2f})")
