"""The entry point of the command: how much of a framework's start-up log is shown."""

import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kerasmp_command

ROOT = Path(__file__).parents[1]
INFO = "I0000 00:00:1795473535.053 2158 port.cc:153] oneDNN custom operations are on.\n"
WARNING = "W0000 00:00:1795473535.061 2158 cpu.cc:7] This is not the fastest way.\n"
ERROR = "E1129 14:09:31.316279 16613 cuda_dnn.cc:8] Unable to register cuDNN factory.\n"
FATAL = "F0000 00:00:1795473535.070 2158 cpu_feature_guard.cc:5] This needs AVX instructions.\n"
HEAD = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
PYTHON = "UserWarning: mind this, e.g. that I0000 00:00 stands here\n"

pytestmark = pytest.mark.unit

# A package that logs during import, like a framework.
LOGGING = f"""
import os, sys
os.write(2, {(HEAD + INFO + WARNING + ERROR + FATAL).encode()!r})
print({PYTHON!r}, end="", file=sys.stderr)
"""
CLI = "import os\ndef main(): os.write(2, os.environ['TF_CPP_MIN_LOG_LEVEL'].encode() + {!r})"


def run(folder, package, level=None):
    """Run the command with another package in place of kerasmp."""
    (folder / "kerasmp").mkdir()
    (folder / "kerasmp" / "__init__.py").write_text(package)
    (folder / "kerasmp" / "cli.py").write_text(CLI.format(f"\n{INFO}".encode()))
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    environment |= {} if level is None else {"TF_CPP_MIN_LOG_LEVEL": level}
    return subprocess.run(
        [sys.executable, "-m", "kerasmp_command"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (None, FATAL + PYTHON + "3\n"),
        ("3", FATAL + PYTHON + "3\n"),
        ("4", FATAL + PYTHON + "4\n"),
        ("2", ERROR + FATAL + PYTHON + "2\n"),
        ("1", WARNING + ERROR + FATAL + PYTHON + "1\n"),
        ("0", HEAD + INFO + WARNING + ERROR + FATAL + PYTHON + "0\n"),
    ],
)
def test_only_the_levels_that_are_asked_for_are_shown_and_later_lines_all(tmp_path, level, shown):
    done = run(tmp_path, LOGGING, level)
    assert (done.returncode, done.stderr) == (0, shown + INFO)


def test_an_error_while_it_is_loaded_is_shown_whole(tmp_path):
    done = run(tmp_path, LOGGING + "raise RuntimeError('no such library')")
    assert done.returncode == 1
    assert done.stderr.startswith(FATAL + PYTHON + "Traceback")
    assert done.stderr.endswith("RuntimeError: no such library\n")


def test_the_last_message_is_shown_even_if_the_process_ends_at_once(tmp_path):
    done = run(tmp_path, LOGGING + "sys.stderr.flush()\nos.abort()")
    assert done.returncode not in {0, 1}
    assert done.stderr == FATAL + PYTHON


def test_the_warning_of_tensorflow_about_many_compiled_models_is_dropped(tmp_path):
    tell = "import logging\nfor text in ('5 out of 9 triggered tf.function retracing', 'Mind %s'):"
    done = run(tmp_path, f"{tell} logging.getLogger('tensorflow').warning(text)")
    assert done.stderr == f"Mind %s\n3\n{INFO}"


def test_importing_it_changes_nothing():
    assert not logging.getLogger("tensorflow").filters


def test_the_installed_command_starts_here():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["scripts"] == {"kerasmp": f"{kerasmp_command.__name__}:main"}
    targets = settings["tool"]["hatch"]["build"]["targets"]
    assert "kerasmp_command.py" in targets["wheel"]["packages"]
    assert "/kerasmp_command.py" in targets["sdist"]["include"]
