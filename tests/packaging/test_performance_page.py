"""docs/performance.md is what the script makes from its measurements."""

import pytest
from helpers import measurements, performance_page

pytestmark = pytest.mark.unit

DATA = measurements.read(performance_page.DATA)
ROWS = [row for entry in DATA.values() for row in entry["rows"]]


def test_the_page_is_made_from_the_data():
    page = performance_page.DATA.with_suffix(".md")
    assert page.read_text(encoding="utf-8") == performance_page.page(DATA)


def test_every_ratio_is_of_30_rounds_and_stands_beside_the_same_thing_again():
    timed = [row for row in ROWS if row["compared"]]
    assert timed
    assert all(row["rounds"] >= 30 for row in timed)
    assert all(list(row["compared"])[1] == performance_page.AGAIN for row in timed)


def test_a_target_is_met_where_the_interval_reaches_it():
    def row(*cpu):
        found = {"wall": [0.0, 0.0, 0.0], "cpu": cpu}
        return {"group": "step", "name": "mlp", "way": "jax", "compared": {"kerasmp": found}}

    assert performance_page.met(row(1.04, 1.09, 1.2)) == (1.05, True)
    assert performance_page.met(row(1.06, 1.07, 1.08)) == (1.05, False)
