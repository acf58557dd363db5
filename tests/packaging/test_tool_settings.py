"""Every rule of a tool that is switched off has a reason."""

import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "pyproject.toml").read_text()
RULE = re.compile(r'^"[A-Z]+\d*",')
SILENCED = re.compile(
    r"#\s*(?:noqa: (?P<rules>[A-Z\d, ]*\d)|type: ignore\[(?P<errors>[\w, -]+)\]|(?P<any>noqa|type:"
    r" ignore|pragma: no (?:cover|branch)))(?P<reason>.*)"
)


def test_everything_is_on():
    assert tomllib.loads(TEXT)["tool"]["ruff"]["lint"]["select"] == ["ALL"]
    assert tomllib.loads(TEXT)["tool"]["mypy"]["strict"] is True


def test_warnings_are_errors_and_each_exception_names_a_message():
    first, *others = tomllib.loads(TEXT)["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert first == "error"
    assert all(other.split(":")[1] for other in others)
    lines = [line.strip() for line in TEXT.splitlines()]
    assert all(
        lines[i - 1].startswith(("#", '"ignore:')) for i, x in enumerate(lines) if '"ignore:' in x
    )


def test_each_ignored_rule_has_a_reason():
    rules = [line.strip() for line in TEXT.splitlines() if RULE.match(line.strip())]
    assert rules
    assert not [rule for rule in rules if not re.search(r"#\s*\w", rule)]


def unexplained(lines):
    """Return the lines that silence something without a reason there or earlier in the file."""
    explained, bare = set(), []
    for number, line in enumerate(lines, 1):
        if match := SILENCED.search(line):
            silenced = set((match["rules"] or match["errors"] or match["any"]).split(", "))
            if re.search(r"[a-zA-Z]{2}", match["reason"]):
                explained |= silenced
            elif not silenced <= explained:
                bare.append(f"{number}: {line.strip()}")
    return bare


@pytest.mark.parametrize("package", ["kerasmp", "tests", "examples", "benchmarks", ".ci"])
def test_each_silenced_line_has_a_reason(package):
    bare = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / package).rglob("*.py"))
        if file != Path(__file__) and "work" not in file.relative_to(ROOT).parts
        for line in unexplained(file.read_text(encoding="utf-8").splitlines())
    ]
    assert not bare


def test_unexplained_lines_are_found():
    explained = "f()  # noqa: S603, FBT003 - a fixed command"
    assert unexplained(["f()  # noqa: S603", explained, "g()  # noqa: FBT003"]) == [
        "1: f()  # noqa: S603"
    ]
    assert unexplained(["x = 1  # type: ignore[override]", "y = 1  # noqa"]) == [
        "1: x = 1  # type: ignore[override]",
        "2: y = 1  # noqa",
    ]
    assert not unexplained(["x = 1  # pragma: no cover (needs a GPU)"])
