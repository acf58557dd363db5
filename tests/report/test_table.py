"""Tables and progress, on a terminal and in a log file."""

import io

import pytest

from kerasmp.demo import RECIPES, Progress
from kerasmp.diagnosis import Finding, LintReport
from kerasmp.report import ProgressDisplay, demo_table, environment_table, lint_table

pytestmark = pytest.mark.unit


def console(**changes):
    from rich.console import Console

    return Console(file=io.StringIO(), width=80, **changes)


def test_the_table_fits_80_columns_with_every_name_and_number(result):
    paper = console()
    paper.print(demo_table(result))
    lines = paper.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split() for line in lines if "%" in line}
    for recipe in RECIPES:
        assert rows[recipe.name][1:5] == ["87.5%", "0.5000", "2.50", "ms"]
    assert rows["mixed_float16_fixed"][5:] == ["3", "2^15", "1.0", "MiB"]
    text = paper.file.getvalue()
    assert "stripes 1.0.0: 320 + 40 images, 2 epochs, Keras on tensorflow" in text
    assert "not measured" in text


def test_the_environment_is_shown_in_full(result):
    paper = console()
    paper.print(environment_table(result.environment))
    text = paper.file.getvalue()
    for word in ("9.8.7", "3.1.4", "tensorflow", "cpu:0", "A <fast> processor, 2 cores", "float32"):
        assert word in text


def events():
    yield Progress("float32", 1, 2, 0, 20)
    yield Progress("float32", 1, 2, 16, 20, 0.5)
    yield Progress("float32", 1, 2, 20, 20, 0.25, finished=True)
    yield Progress("mixed_float16", 2, 2, 0, 20)
    yield Progress("mixed_float16", 2, 2, 20, 20, float("nan"), finished=True)


def test_a_log_file_gets_two_lines_for_each_run():
    paper = console()
    with ProgressDisplay(paper) as display:
        for event in events():
            display(event)
    assert paper.file.getvalue().splitlines() == [
        "1/2 float32: training for 20 steps",
        "1/2 float32: 20 steps done, loss 0.2500",
        "2/2 mixed_float16: training for 20 steps",
        "2/2 mixed_float16: 20 steps done, loss nan",
    ]


def test_a_terminal_gets_a_bar_for_each_run():
    paper = console(force_terminal=True)
    with ProgressDisplay(paper) as display:
        for event in events():
            display(event)
    last = paper.file.getvalue()
    assert "1/2 float32" in last
    assert "20/20 steps" in last
    assert "loss 0.2500" in last
    assert "loss nan" in last


def test_the_table_of_lint_has_all_words_of_each_finding():
    finding = Finding("error", "body/[dense]", "float16-head", "It is half.", "Make it whole.")
    paper = console()
    paper.print(lint_table(LintReport((finding,))))
    words = paper.file.getvalue().split()
    for part in ("error", "body/[dense]", "float16-head", "half.", "whole."):
        assert part in words
