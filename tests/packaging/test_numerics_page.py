"""docs/numerics.md is what the script makes from its measurements, and they are good."""

import pytest
from helpers import numerics_page
from helpers.hazards import HAZARDS
from helpers.precision import ALLOWED

DATA = numerics_page.read()
ROWS = [row for entry in DATA.values() for row in entry["rows"]]


def test_the_page_is_made_from_the_data():
    assert numerics_page.PAGE.read_text(encoding="utf-8") == numerics_page.page(DATA)


def test_nothing_of_ours_is_above_what_is_allowed():
    assert not [row for row in ROWS if numerics_page.ratio(row) > ALLOWED]
    assert {entry["allowed"] for entry in DATA.values()} == {ALLOWED}


def test_every_backend_is_there_and_every_hazard_of_the_list():
    assert {row["way"] for row in ROWS} == set(numerics_page.WAYS)
    listed = {(hazard.number, hazard.name) for hazard in HAZARDS}
    for way in numerics_page.WAYS:
        assert {(row["number"], row["name"]) for row in ROWS if row["way"] == way} == listed


@pytest.mark.parametrize("number", range(1, 20))
def test_each_hazard_is_one_in_stock_keras(number):
    rows = [row for row in ROWS if row["number"] == number]
    assert any(numerics_page.ratio(row, "stock") > ALLOWED for row in rows)
