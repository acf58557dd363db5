"""Ratios of times: what is compared takes turns in random order, in one process.

Absolute times on a machine that is shared mean little; the median over rounds of the ratio to the
first of the compared, taken in the same round, holds still.
"""

import math
import os
import platform
import random
import statistics
import time

import keras

AGAIN = "again"  # the first of the compared once more: how far apart the same thing is from itself


def measure(compared, rounds):
    """Return wall and CPU seconds of each function in each round.

    Args:
        compared: Dict of names and functions without arguments; the first is what others are
            compared to. A round before the first one, which compiles, is left out.
        rounds: How often each runs.
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
    """Return, for each name, the ratios of wall and of CPU time: the median and its interval.

    The interval holds the median of all rounds there could be with 95 % (the order statistics of
    a sign test), whatever the distribution.
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
    """Print, for each name, the median ratio of wall time and, behind the slash, of CPU time."""
    print(f"{title}: {keras.backend.backend()}, Keras {keras.__version__}", end=", ")
    print(f"{os.cpu_count()} cores, {platform.machine()}")
    for name, found in ratios(times).items():
        (_, wall, _), (low, cpu, high) = found["wall"], found["cpu"]
        print(f"  {name:34s} {wall:5.2f} / {cpu:5.2f}  ({low:.2f} to {high:.2f})")
