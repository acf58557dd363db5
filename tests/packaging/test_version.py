"""The version is written in one place."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import kerasmp

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_installed_version_is_the_packages_own():
    assert importlib.metadata.version("kerasmp") == kerasmp.__version__


def test_pyproject_takes_the_version_from_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["hatch"]["version"]["path"] == "kerasmp/__init__.py"


def test_changelog_knows_the_version():
    heads = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert kerasmp.__version__ in heads or "Unreleased" in heads
