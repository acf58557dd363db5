"""`import kerasmp` costs little and imports nothing that Keras did not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
from helpers.marks import marks_on

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"tensorflow", "jax", "torch"}
OPTIONAL = {"jinja2", "matplotlib", "rich", "sklearn", "tensorflow_datasets", "typer"}

# One backend is enough for the quick set: no package depends on the current one.
pytestmark = marks_on("jax", "torch")

# Frameworks that are not installed count too: the finder sees who asks for them. A full collection
# of the garbage of Keras and torch may be due at any moment, and would take 0.25 seconds.
IMPORTED = """
import gc, json, sys, time
import keras

class Watch:
    asked = set()
    def find_spec(self, name, path=None, target=None):
        self.asked.add(name.partition(".")[0])

sys.meta_path.insert(0, Watch())
gc.disable()
start = time.process_time()
import kerasmp
print(json.dumps([time.process_time() - start, sorted(Watch.asked)]))
"""


def imported():
    """Return the seconds of CPU time that it takes, and the packages that are asked for."""
    left_out = ("COV_", "COVERAGE_", "PYTHONDONTWRITEBYTECODE")  # installed code is compiled
    env = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    env |= {"KERAS_BACKEND": keras.backend.backend(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_asks_for_no_other_package_and_adds_less_than_a_tenth_of_a_second():
    limit = 0.1
    seconds, asked = imported()
    assert "kerasmp" in asked
    assert not set(asked) & (FRAMEWORKS | OPTIONAL)
    times = [seconds]
    while len(times) < 3 and min(times) >= limit:
        times.append(imported()[0])
    assert min(times) < limit, times
