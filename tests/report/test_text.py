"""Numbers as text."""

import json
import math

import pytest

from kerasmp.report.text import COLUMNS, cells, kibibytes, number, plain, scale, seconds

pytestmark = pytest.mark.unit


def test_a_row_has_a_cell_for_each_column(result):
    rows = [cells(run) for run in result.runs]
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[0] == ("float32", "87.5%", "0.5000", "2.50 ms", "-", "-", "1.0 MiB")
    assert rows[2] == ("mixed_float16", "87.5%", "0.5000", "2.50 ms", "3", "2^15", "1.0 MiB")


def test_numbers_that_are_not_finite_are_named(broken):
    first, second = (cells(run) for run in broken.runs)
    assert (first[2], first[3]) == ("nan", "-")
    assert second[2] == "inf"


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0**15, "2^15"), (1.0, "2^0"), (0.5, "2^-1"), (1000.0, "1000"), (0.0, "0"), (None, "-")],
)
def test_scales(value, text):
    assert scale(value) == text


def test_scale_that_is_not_finite():
    assert scale(math.inf) == "inf"


def test_units():
    assert number(0.5, ".1f", " ms") == "0.5 ms"
    assert kibibytes(1023 * 1024) == "1023 KiB"
    assert kibibytes(3 * 2**19) == "1.5 MiB"
    assert seconds(59.94) == "59.9 s"
    assert [seconds(value) for value in (119.7, 125.0)] == ["2 min 0 s", "2 min 5 s"]


def test_plain_results_are_json(broken):
    text = json.dumps(plain(broken), allow_nan=False)
    found = json.loads(text)
    assert found["runs"][0]["loss"] == [1.0, None]
    assert found["runs"][1]["recipe"]["loss_scale"]["type"] == "DynamicLossScale"
    assert found["settings"]["data_dir"] is None
    assert found["histograms"][0]["first"] == -30
