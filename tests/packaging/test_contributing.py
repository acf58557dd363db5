"""CONTRIBUTING.md names files, folders and functions that exist."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FOLDERS = ("kerasmp", "tests", "examples", "benchmarks", "findings", "docs", ".ci")
# A path below one of these folders, or one of the packages in kerasmp/.
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*|[a-z_]+/)`")
# A class, a method or a function, and the file that defines it.
DEFINED = re.compile(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`")
CREATED = {".ci/work/"}  # by .ci/run


def test_every_path_exists():
    paths = set(PATH.findall(TEXT)) - CREATED
    assert len(paths) > 40
    if not (ROOT / ".ci").exists():  # an sdist has none
        paths = {path for path in paths if not path.startswith(".ci/")}
    places = (ROOT, ROOT / "kerasmp")
    assert not [path for path in paths if not any((place / path).exists() for place in places)]


def test_every_function_is_defined_in_its_file():
    pairs = DEFINED.findall(TEXT)
    assert len(pairs) > 15
    lost = [
        f"{name} in {file}"
        for name, file in pairs
        for part in name.split(".")
        if not re.search(rf"(?m)^\s*(def|class) {part}\b|^{part}\b.* =", (ROOT / file).read_text())
    ]
    assert not lost
