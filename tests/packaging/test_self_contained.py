"""Nothing in the project needs or mentions a file outside it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
# Written so that this file does not match itself.
OUTSIDE = re.compile(r"\.\./" + r"shared\b|/(?:work|home)" + r"/\w|/tmp" + r"/envs\b")
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ".html", ".j2", ".svg", ""}


def files():
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    packages = ["kerasmp", "tests", "examples", "docs", "benchmarks"]
    return [
        *ROOT.glob("*.*"),
        *(file for package in packages for file in (ROOT / package).rglob("*.*")),
    ]


def test_no_file_mentions_a_path_outside():
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in files()
        if file.is_file() and file.suffix in TEXT
        if (match := OUTSIDE.search(file.read_text(encoding="utf-8", errors="replace")))
    ]
    assert not found


def test_no_link_leads_outside():
    outside = [file for file in files() if not file.resolve().is_relative_to(ROOT.resolve())]
    assert not outside


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_project_has_the_files_that_people_look_for(name):
    assert (ROOT / name).stat().st_size
