"""`import kerasmp` costs little and brings in nothing that Keras did not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"tensorflow", "jax", "torch"}
OPTIONAL = {"jinja2", "matplotlib", "rich", "sklearn", "tensorflow_datasets", "typer"}

# Frameworks that are not installed count too: the finder sees who asks for them.
IMPORTED = """
import json, sys
import keras

class Watch:
    asked = set()
    def find_spec(self, name, path=None, target=None):
        self.asked.add(name.partition(".")[0])

sys.meta_path.insert(0, Watch())
import kerasmp
print(json.dumps(sorted(Watch.asked)))
"""

SECONDS = """
import time
import keras
start = time.perf_counter()
import kerasmp
print(time.perf_counter() - start)
"""


def python(code):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "COVERAGE_"))}
    env |= {"KERAS_BACKEND": keras.backend.backend(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_asks_for_no_framework_and_no_optional_package():
    asked = set(python(IMPORTED))
    assert "kerasmp" in asked
    assert not asked & (FRAMEWORKS | OPTIONAL)


def test_import_adds_less_than_a_third_of_a_second():
    limit = 0.3
    times = []
    while len(times) < 3 and min(times, default=limit) >= limit:
        times.append(python(SECONDS))
    assert min(times) < limit, times
