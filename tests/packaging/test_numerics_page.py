"""docs/numerics.md is generated from its measurements, and they are good."""

import pytest
from helpers import measurements, numerics_page
from helpers.float16 import HALVES
from helpers.hazards import HAZARDS
from helpers.precision import ALLOWED

pytestmark = pytest.mark.unit

DATA = measurements.read(numerics_page.DATA)
ROWS = [row for entry in DATA.values() for row in entry["rows"]]


def test_the_page_is_made_from_the_data():
    page = numerics_page.DATA.with_suffix(".md")
    assert page.read_text(encoding="utf-8") == numerics_page.page(DATA)


def test_no_error_is_above_the_allowed_multiple():
    assert not [row for row in ROWS if numerics_page.ratio(row) > ALLOWED]
    assert {entry["allowed"] for entry in DATA.values()} == {ALLOWED}


def test_every_backend_is_there_and_every_hazard_of_the_list_in_each_half_precision():
    assert tuple(HALVES) == numerics_page.HALVES
    for half in HALVES:
        rows = [row for entry in numerics_page.measured_in(DATA, half) for row in entry["rows"]]
        assert {row["way"] for row in rows} == set(numerics_page.WAYS)
        listed = {(each.number, each.name) for each in HAZARDS if half in each.halves}
        for way in numerics_page.WAYS:
            found = {(row["number"], row["name"]) for row in rows if row["way"] == way}
            assert found == listed


def test_the_page_begins_with_the_largest_error_in_each_half_precision():
    top = numerics_page.page(DATA).partition("## ")[0]
    for half in HALVES:
        rows = [row for entry in numerics_page.measured_in(DATA, half) for row in entry["rows"]]
        assert f"{max(map(numerics_page.ratio, rows)):.1f} times the best in {half}**" in top


# A hazard with other inputs in bfloat16 is one in float16, and perhaps in bfloat16.
IN_FLOAT16 = [each.name for each in HAZARDS if each.number and "float16" in each.halves]


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_stock_keras_is_wrong_on_each_hazard(name):
    rows = [row for row in ROWS if (row["name"], row["inputs"]) == (name, numerics_page.HAZARD)]
    assert any(numerics_page.ratio(row, "stock") > ALLOWED for row in rows)


def test_the_best_of_a_hazard_is_good_enough_to_tell_right_from_wrong():
    assert not [row for row in ROWS if row["best"] * ALLOWED > 1]


def test_all_hazards_of_the_list_are_there():
    assert {hazard.number for hazard in HAZARDS} == {0, *range(1, 20), 21}
