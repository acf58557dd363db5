"""Ratios of times: what is compared takes turns in random order, in one process.

Absolute times on a machine that is shared mean little; the median over rounds of the ratio to the
first of the compared, taken in the same round, holds still.
"""

import os
import platform
import random
import statistics
import time

import keras


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


def report(title, times):
    """Print, for each name, the median ratio of wall time and, behind the slash, of CPU time."""
    first = next(iter(times.values()))
    print(f"{title}: {keras.backend.backend()}, Keras {keras.__version__}", end=", ")
    print(f"{os.cpu_count()} cores, {platform.machine()}")
    for name, taken in times.items():
        wall, cpu = (
            statistics.median(one[i] / base[i] for one, base in zip(taken, first, strict=True))
            for i in (0, 1)
        )
        print(f"  {name:34s} {wall:5.2f} / {cpu:5.2f}")
