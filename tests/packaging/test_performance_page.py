"""docs/performance.md is generated from its measurements."""

import pytest
from helpers import measurements, performance_page

pytestmark = pytest.mark.unit

DATA = measurements.read(performance_page.DATA)
ROWS = [row for entry in DATA.values() for row in entry["rows"]]


def test_the_page_is_made_from_the_data():
    page = performance_page.DATA.with_suffix(".md")
    assert page.read_text(encoding="utf-8") == performance_page.page(DATA)


def test_every_ratio_has_30_rounds_and_a_control():
    timed = [row for row in ROWS if row["compared"]]
    assert timed
    assert all(row["rounds"] >= 30 for row in timed)
    assert all(list(row["compared"])[1] == performance_page.AGAIN for row in timed)


def test_a_target_is_met_where_the_interval_reaches_it_and_the_control_is_1():
    def judged(ours, again=(0.99, 1.0, 1.01)):
        found = {key: {"cpu": cpu} for key, cpu in (("again", again), ("kerasmp", ours))}
        row = {"group": "step", "name": "mlp", "way": "jax", "compared": found}
        return performance_page.judged(row)

    assert judged((1.04, 1.09, 1.2)) == (1.05, "met")
    assert judged((1.06, 1.07, 1.08)) == (1.05, "missed")
    assert judged((1.04, 1.09, 1.2), again=(0.97, 0.98, 0.99)) == (1.05, "undecided")


def test_each_row_names_the_version_of_the_framework():
    for run, entry in DATA.items():
        framework = run.partition(",")[0]
        assert all(any(framework in each for each in row["versions"]) for row in entry["rows"])
