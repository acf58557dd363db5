"""docs/numerics.md is what the script makes from its measurements, and they are good."""

import pytest
from helpers import measurements, numerics_page
from helpers.hazards import HAZARDS
from helpers.precision import ALLOWED

pytestmark = pytest.mark.unit

DATA = measurements.read(numerics_page.DATA)
ROWS = [row for entry in DATA.values() for row in entry["rows"]]


def test_the_page_is_made_from_the_data():
    page = numerics_page.DATA.with_suffix(".md")
    assert page.read_text(encoding="utf-8") == numerics_page.page(DATA)


def test_nothing_of_ours_is_above_what_is_allowed():
    assert not [row for row in ROWS if numerics_page.ratio(row) > ALLOWED]
    assert {entry["allowed"] for entry in DATA.values()} == {ALLOWED}


def test_every_backend_is_there_and_every_hazard_of_the_list():
    assert {row["way"] for row in ROWS} == set(numerics_page.WAYS)
    listed = {(hazard.number, hazard.name) for hazard in HAZARDS}
    for way in numerics_page.WAYS:
        assert {(row["number"], row["name"]) for row in ROWS if row["way"] == way} == listed


@pytest.mark.parametrize("name", [hazard.name for hazard in HAZARDS if hazard.number])
def test_each_hazard_is_one_in_stock_keras(name):
    rows = [row for row in ROWS if (row["name"], row["inputs"]) == (name, numerics_page.HAZARD)]
    assert any(numerics_page.ratio(row, "stock") > ALLOWED for row in rows)


def test_the_best_of_a_hazard_is_good_enough_to_tell_right_from_wrong():
    assert not [row for row in ROWS if row["best"] * ALLOWED > 1]


def test_all_hazards_of_the_list_are_there():
    assert {hazard.number for hazard in HAZARDS} == {0, *range(1, 20)}
