"""Writes reports to disk: checks the folder first, and never leaves a half-written file."""

from __future__ import annotations

import contextlib
import errno
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kerasmp.errors import OutputError
from kerasmp.report.html import demo_html
from kerasmp.report.text import plain

if TYPE_CHECKING:
    from kerasmp.demo import DemoResult


def check_folder(folder: Path) -> Path:
    """Check that a folder is writable or can be created. Call this before the work starts.

    Args:
        folder: The folder. If it does not exist, the check does not create it.

    Returns:
        The folder, with "~" replaced by the user's home.

    Raises:
        OutputError: If the folder cannot be created or written.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise _cannot_write(folder, NotADirectoryError(errno.ENOTDIR, "it is a file"))
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        for each in created:
            with contextlib.suppress(OSError):
                each.rmdir()
    return folder


def write_demo(result: DemoResult, folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `results.json`, and replace earlier files of these names.

    Args:
        result: The result of `run_demo`.
        folder: The folder.

    Returns:
        The paths of the report and the results.

    Raises:
        OutputError: If a file cannot be written.
    """
    folder = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report, results = folder / "report.html", folder / "results.json"
    _replace(report, demo_html(result))
    _replace(results, json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    return report, results


def _replace(path: Path, text: str) -> None:
    # An interrupted run must not replace an earlier report by half of a new one.
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        "The report cannot be written.",
        received=f"{path} ({error.strerror or error})",
        expected="a writable folder",
        fix="Pass another folder with --output.",
    )
