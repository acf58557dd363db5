"""How arrays are compared, which values rounding merges, and which step the probe blames."""

import numpy as np
import pytest

from kerasmp.probe import compare as module
from kerasmp.probe.compare import EPSILON, Comparison, Merge, compare, merged
from kerasmp.probe.judge import Verdict, is_at_fault, judge

pytestmark = pytest.mark.unit

INF, NAN = np.inf, np.nan


def compared(half, wide, dtype="float16"):
    return compare(np.array([half], "float32"), np.array([wide], "float32"), dtype)


@pytest.mark.parametrize(
    ("half", "wide", "counts"),
    [
        ([INF, -INF, 1], [7e4, -7e4, 1], (2, 0, 0, 1)),
        ([INF, 1, 1], [6e4, 1, 1], (0, 1, 0, 2)),  # float16 can hold it
        ([INF, 1, 1], [-7e4, 1, 1], (0, 1, 0, 2)),  # the wrong sign
        ([NAN, 1, 1], [7e4, 1, 1], (0, 1, 0, 2)),
        ([1, 1, 1], [INF, NAN, 1], (0, 2, 0, 1)),
        ([INF, -INF, NAN], [INF, -INF, NAN], (0, 0, 0, 0)),  # the same in both
        ([0, 0, 1], [1e-9, 0, 1], (0, 0, 1, 2)),
        ([INF, NAN, 0], [7e4, 1, 1e-9], (1, 1, 1, 1)),
    ],
)
def test_each_kind_of_value_is_counted_apart(half, wide, counts):
    found = compared(half, wide)
    assert (found.saturated, found.nonfinite, found.flushed, found.nonzero) == counts
    assert found.size == 3


def test_the_range_is_that_of_the_dtype():
    assert compared([INF], [7e4], "bfloat16").nonfinite == 1
    assert compared([INF], [3.4e38], "bfloat16").saturated == 1


def test_the_error_is_that_of_the_worst_row_relative_to_at_least_the_whole_tensor():
    wide = np.array([[3, 4], [300, 400]], "float32")
    half = wide + np.array([[0, 0], [50, 0]], "float32")
    assert compare(half, wide).error == pytest.approx(0.1)
    # An error of the small row counts relative to the mean square of all values.
    other = wide + np.array([[50, 0], [0, 0]], "float32")
    assert compare(other, wide).error == pytest.approx(0.1 * 2**0.5, rel=1e-3)


def test_a_few_steps_of_float16s_smallest_numbers_are_no_error():
    tiny = np.full((1, 4), 2.0**-22, "float32")
    assert compare(tiny + np.float32(8 * 2.0**-24), tiny, "float16").error == 0
    assert compare(tiny + np.float32(8 * 2.0**-24), tiny, "bfloat16").error > 1


@pytest.mark.parametrize(
    ("half", "wide", "worst"),
    [
        ([1, 9, 2], [1, 3, 2], (9, 3)),
        ([1, 9, INF], [1, 3, 7e4], (INF, 7e4)),
        ([5, INF, INF], [1, 7e4, 2], (INF, 2)),  # a broken value before one outside the range
    ],
)
def test_the_worst_pair_shows_the_worst_kind(half, wide, worst):
    assert compared(half, wide).worst == worst


def test_arrays_are_compared_in_parts_with_the_same_result(monkeypatch):
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(40, 3)).astype("float32")
    half = wide.astype("float16")
    half[5, 1], half[33, 2], half[39, 0] = 0, INF, 90
    wide[33, 2] = 7e4
    wide[20] = 0
    at_once = compare(half, wide)
    monkeypatch.setattr(module, "_CHUNK", 9)
    in_parts = compare(half, wide)
    assert in_parts[:5] == at_once[:5] == (120, 1, 0, 1, 116)
    assert in_parts.error == pytest.approx(at_once.error)
    assert in_parts.worst == at_once.worst == (INF, 7e4)


def test_more_values_than_a_part_holds_are_all_seen():
    wide = np.ones((3, module._CHUNK), "float32")
    half = wide.astype("float16")
    half[-1, -1] = 0
    found = compare(half, wide)
    assert (found.size, found.flushed, found.worst) == (wide.size, 1, (0, 1))


def test_integers_and_bools_differ_or_not():
    assert compare(np.array([1, 2, 3]), np.array([1, 5, 6])) == Comparison(3, differing=2)
    masks = np.array([True, False]), np.array([True, True])
    assert compare(*masks).differing == 1


def test_an_empty_array_has_no_differences():
    assert compare(np.ones((0, 3), "float16"), np.ones((0, 3), "float32")) == Comparison()


# merged


MONTHS = np.arange(2019.0, 2024.0, 1 / 12)[:, None]
RNG = np.random.default_rng(0)
MEAN, SPREAD = 1e4, 2.0


def column_of(values, half):
    found = merged(values, half)
    return None if found is None else (found.column, found.before, found.after)


def test_distinct_values_that_become_equal_are_counted():
    days = np.arange(20190.0, 20250.0)[:, None]
    assert merged(days, "float16") == Merge(0, 60, 5, (20190.0, 20191.0))


@pytest.mark.parametrize(
    ("values", "half", "column"),
    [
        (np.arange(4096)[:, None], "bfloat16", 0),  # ids
        (np.arange(4096)[:, None], "float16", 0),
        (np.arange(1000).astype("float32"), "bfloat16", None),  # timesteps
        (np.stack([np.zeros(900), np.arange(900)], 1), "bfloat16", 1),
        (RNG.normal(MEAN, SPREAD, (64, 1)), "float16", 0),
        (np.hstack([RNG.normal(size=(64, 2)), RNG.normal(MEAN, SPREAD, (64, 1))]), "float16", 2),
        (MONTHS, "bfloat16", 0),
        (RNG.normal(MEAN, SPREAD, (8, 8, 3)), "float16", 0),  # also in a sequence
    ],
)
def test_values_of_a_table_that_rounding_merges_are_found(values, half, column):
    found = merged(values, half)
    assert found is not None
    assert found.column == column
    assert found.after < found.before
    one, other = found.example
    assert one != other
    assert len(np.unique(module._round(np.array([one, other], "float32"), half))) == 1


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "values",
    [
        RNG.integers(0, 256, (4, 16, 16, 3)),  # pixels
        RNG.integers(-(2**15), 2**15, (4, 500, 1)),  # signed audio
        RNG.normal(size=(64, 4)),
        RNG.uniform(0, 1000, (64, 2)),
        np.arange(200)[:, None],  # ids that both hold
        np.full((8, 1), 16384.4),  # only one value
    ],
    ids=["pixels", "audio", "normal", "uniform", "ids", "constant"],
)
def test_values_whose_rounding_is_small_beside_their_spread_are_not(values, half):
    assert merged(values, half) is None


def test_values_outside_the_range_are_another_problem():
    assert merged(np.array([[INF], [NAN], [7e4], [8e4], [1.0]]), "float16") is None


def test_bfloat16_is_rounded_as_by_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = RNG.integers(0, 2**32, 100_000, dtype="uint64").astype("uint32")
    ties = (np.arange(2000, dtype="uint32") << 15) + 0x3F800000
    numbers = np.concatenate([bits, ties]).view("float32")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16).astype("float32")
    np.testing.assert_array_equal(module._round(numbers, "bfloat16"), expected)


def test_the_distance_to_the_next_number_is_that_of_the_dtypes():
    assert EPSILON["float16"] == np.finfo("float16").eps
    assert EPSILON["float32"] == np.finfo("float32").eps
    assert EPSILON["bfloat16"] == 2.0**-7


# Which step is responsible


FINE = Comparison(100, nonzero=100)
EPS = EPSILON["float16"]


def off(roundings):
    return FINE._replace(error=roundings * EPS)


OFF = off(100)
BROKEN, SATURATED = FINE._replace(nonfinite=1), FINE._replace(saturated=1)
FLUSHED = FINE._replace(flushed=2)


@pytest.mark.parametrize(
    ("seen", "alone", "error", "has_troubles", "verdict"),
    [
        (Comparison(4, differing=1), None, 0, False, Verdict.CHOICE),
        (SATURATED, None, 0, True, Verdict.CARRY),
        (FLUSHED, None, 0, True, Verdict.CARRY),
        (BROKEN, BROKEN, 0, False, Verdict.BROKEN),
        (BROKEN, BROKEN, 0, True, Verdict.BROKEN),
        (SATURATED, SATURATED, 0, False, Verdict.OVERFLOW),
        (OFF, OFF, 0, False, Verdict.ERROR),
        (OFF, OFF, 0, True, Verdict.ERROR),
        (BROKEN, FINE, 0, True, Verdict.EARLIER),
        (OFF, FINE, 0, True, Verdict.EARLIER),
        (BROKEN, FINE, 0, False, Verdict.SENSITIVE),
        (FINE._replace(error=0.2), FINE, EPS, False, Verdict.SENSITIVE),
        (FLUSHED, FLUSHED, 0, False, Verdict.UNDERFLOW),
        # Rounding of the inputs explains it.
        (OFF, off(2), 0, False, Verdict.FINE),
        (FLUSHED, FINE, 0, False, Verdict.FINE),
        # It is twice as large as the error of the inputs.
        (FINE._replace(error=0.9), FINE, 0.4, False, Verdict.FINE),
    ],
)
def test_each_verdict_follows_from_the_numbers(seen, alone, error, has_troubles, verdict):
    found, numbers = judge(seen, lambda: alone, error, "float16", has_troubles=has_troubles)
    assert found is verdict
    assert numbers in {seen, alone}


def test_the_step_does_not_run_again_if_nothing_is_suspicious():
    def own():
        raise AssertionError

    one_in_a_hundred = FINE._replace(flushed=1)
    for seen, error in (
        (FINE, 0.0),
        (one_in_a_hundred, 0.0),
        (off(8), 0.0),
        (off(100), 50 * EPS),  # no more than twice that of the inputs
    ):
        assert judge(seen, own, error, "float16", has_troubles=False) == (Verdict.FINE, seen)


def test_bfloat16_rounds_eight_times_as_coarsely():
    assert is_at_fault(OFF, "float16")
    assert not is_at_fault(OFF, "bfloat16")
    assert is_at_fault(off(130), "bfloat16")
    assert is_at_fault(BROKEN, "bfloat16")


def test_only_values_that_may_not_matter_wait_for_a_later_step():
    assert {each for each in Verdict if each.waits} == {Verdict.OVERFLOW, Verdict.UNDERFLOW}
