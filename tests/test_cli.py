"""The command line as a user types it: what it prints, writes and returns."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import kerasmp
from kerasmp.demo import DemoSettings

pytest.importorskip("typer")  # the full set names this file also where the demo is not installed

ROOT = Path(__file__).parents[1]
# The demo's packages are installed with TensorFlow only, whose log the command hides.
on_tensorflow = pytest.mark.backend("tensorflow")


@pytest.fixture
def call(monkeypatch, capfd):
    """Return a function that runs the command and returns exit code, stdout and stderr."""
    from kerasmp import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kerasmp", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed, complained = capfd.readouterr()
        code = stopped.value.code
        return (code or 0), printed, " ".join(complained.split())

    return run


@pytest.mark.unit
def test_version(call):
    assert call("--version") == (0, f"kerasmp {kerasmp.__version__}\n", "")


@pytest.mark.unit
def test_help_lists_the_commands_and_every_option(call):
    assert "demo" in call("--help")[1]
    code, printed, _ = call("demo", "--help")
    assert code == 0
    for option in ("dataset", "data-dir", "epochs", "policies", "output", "seed", "limit"):
        assert f"--{option}" in printed


def in_a_process(*arguments, **settings):
    """Run the command as the console script does, with default settings of TensorFlow's log."""
    done = subprocess.run(
        [sys.executable, "-m", "kerasmp_command", *map(str, arguments)],
        env={k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
        | {"PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@on_tensorflow
def test_env_prints_this_machine_and_nothing_else():
    # With oneDNN, which TensorFlow logs before it reads any setting.
    code, printed, complained = in_a_process("env", TF_ENABLE_ONEDNN_OPTS="1")
    assert (code, complained) == (0, "")
    assert keras.__version__ in printed
    assert "recommended policy" in printed


@on_tensorflow
@pytest.mark.full  # tests/test_command.py tests what is hidden
def test_the_demo_of_all_policies_prints_nothing_of_tensorflow(tmp_path):
    code, printed, complained = in_a_process(
        *("demo", "--epochs", 1, "--limit", 100),
        *("--output", tmp_path / "out", "--data-dir", tmp_path / "tfds"),
    )
    assert (code, complained) == (0, "")
    assert printed.startswith("1/5 float32: training for 3 steps\n")


@on_tensorflow
@pytest.mark.full  # .ci/run runs the command too; tests/demo and tests/report have its parts
def test_demo_from_digits_to_report(call, tmp_path):
    output = tmp_path / "out"
    code, printed, complained = call(
        "demo", "--data-dir", tmp_path / "tfds", "--output", output,
        "--epochs", 1, "--limit", 64, "--seed", 3, "--policies", "float32, mixed_float16",
    )  # fmt: skip
    assert (code, complained) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == "1/2 float32: training for 2 steps"
    assert lines[2] == "2/2 mixed_float16: training for 2 steps"
    assert f"Report: {output / 'report.html'}" in lines
    assert f"Results: {output / 'results.json'}" in lines
    found = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert found["dataset"] == "kerasmp_digits 1.0.0"
    assert found["settings"]["seed"] == 3
    assert [run["recipe"]["name"] for run in found["runs"]] == ["float32", "mixed_float16"]
    for run in found["runs"]:
        assert f"{run['test_accuracy'][-1]:.1%}" in printed
    # Two steps are too few for the highest scale to fall: the run starts with a lower one.
    assert found["runs"][1]["skipped_steps"] == 0
    assert found["runs"][1]["final_scale"] == 2**15
    assert all(math.isfinite(run["loss"][-1]) for run in found["runs"])
    assert "<svg" in (output / "report.html").read_text(encoding="utf-8")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--policies", "mixed_flaot16"), 2, 'Did you mean "mixed_float16"?'),
        (("--epochs", "0"), 2, "`epochs` has an invalid value. Received: 0. Expected: an int"),
        (("--seed", "-1"), 2, "`seed` has an invalid value. Received: -1. Expected: an int"),
        (("--limit", "0"), 2, "`limit` has an invalid value."),
        (("--epochs", "many"), 2, "Invalid value for '--epochs'"),
        (
            ("--policies", ","),
            2,
            "`--policies` has an invalid value. Received: ','. Expected: n",
        ),
        (("--policies", " , "), 2, "`--policies` has an invalid value."),
        (("--output", ""), 2, "`--output` has an invalid value. Received: ''. Expected: a folder."),
        (("--output", " "), 2, "`--output` has an invalid value."),
        (("--data-dir", ""), 2, "`--data-dir` has an invalid value."),
        (("--dataset", ""), 2, "`--dataset` has an invalid value. Received: ''. Expected: a name."),
    ],
)
def test_wrong_usage_is_an_error_without_a_traceback(call, tmp_path, arguments, code, message):
    refused(call, tmp_path, arguments, code, message)
    assert list(tmp_path.iterdir()) == []


@on_tensorflow  # which tensorflow-datasets imports
def test_a_missing_data_set_is_an_error_without_a_traceback(call, tmp_path):
    arguments = ("--dataset", "kerasmp_digit")
    refused(call, tmp_path, arguments, 1, 'Did you mean "kerasmp_digits"?')


def refused(call, tmp_path, arguments, code, message):
    found, _, complained = call(
        "demo", "--output", tmp_path / "out", "--data-dir", tmp_path, *arguments
    )
    assert found == code
    assert message in complained
    assert "Traceback" not in complained


@pytest.mark.unit
def test_the_output_folder_is_checked_before_any_work(call, tmp_path, monkeypatch):
    def work(*_, **__):
        raise AssertionError("trained although the report cannot be written")

    monkeypatch.setattr("kerasmp.demo.run_demo", work)
    file = tmp_path / "file"
    file.write_text("precious")
    code, _, complained = call("demo", "--output", file)
    assert code == 1
    assert "cannot be written" in complained
    assert file.read_text() == "precious"


@pytest.mark.unit
def test_defaults_of_the_options_are_those_of_the_settings(call, tmp_path, monkeypatch):
    asked = []

    def work(settings, **_):
        asked.append(settings)
        raise kerasmp.errors.DatasetError("enough")

    monkeypatch.setattr("kerasmp.demo.run_demo", work)
    assert call("demo", "--output", tmp_path / "new" / "folder")[0] == 1
    assert asked == [DemoSettings()]
    assert list(tmp_path.iterdir()) == []  # of a demo that could not start


@pytest.mark.unit
def test_without_typer_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "kerasmp.cli", raising=False)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("kerasmp.cli")
    line = stopped.value.code  # a string, which Python prints before it exits with 1
    assert line.endswith('pip install "kerasmp[demo]"')
    assert "\n" not in line
