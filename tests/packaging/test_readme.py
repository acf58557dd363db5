"""README.md has exactly two commands, and CI runs them."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "readme_command.py"

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not SCRIPT.exists(), reason="an sdist has no .ci"),
]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("readme_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_two_marked_commands_and_no_other_shell_block(script, readme):
    assert sorted(script.commands(readme)) == ["demo", "test"]
    shell = re.findall(r"^```(?:ba|z)?sh\b|^```(?:console|shell)\b", readme, re.MULTILINE)
    assert len(shell) == 2


@pytest.mark.parametrize("name", ["demo", "test"])
def test_command_needs_python_alone(script, readme, name):
    words = shlex.split(script.commands(readme)[name])
    assert words[:3] == ["python3", "-m", "venv"]
    place = words[3]
    words = [
        word for word in words if not re.fullmatch(r"[A-Z_]+=\w+", word)
    ]  # KERAS_BACKEND=numpy
    after = [word for last, word in itertools.pairwise(words) if last == "&&"]
    assert after, "a command that only makes an environment"
    assert all(program.startswith(f"{place}/bin/") for program in after)


def test_ci_reads_the_commands_from_the_readme():
    run = (ROOT / ".ci" / "run").read_text()
    assert "readme_command.py test" in run
    assert "readme_command.py demo" in run


def test_script_refuses_two_commands_of_a_name_and_blocks_of_two_lines(script):
    block = "<!-- command: test -->\n```bash\n{}\n```\n"
    assert script.commands(block.format("true")) == {"test": "true"}
    with pytest.raises(ValueError, match="two commands"):
        script.commands(block.format("true") * 2)
    with pytest.raises(ValueError, match="exactly one line"):
        script.commands(block.format("true\nfalse"))
