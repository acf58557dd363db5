"""Print the results of `.ci/run`: a table of its parts, and the total number of tests."""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree as ET


def counts(results: Iterable[Path]) -> Counter[str]:
    """Return how many tests in JUnit files passed, failed and were skipped."""
    found: Counter[str] = Counter()
    for suite in (each for file in results for each in ET.parse(file).iter("testsuite")):
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        found.update(passed=tests - failed - skipped, failed=failed, skipped=skipped)
    return found


def words(found: Counter[str]) -> str:
    """Return the counts as pytest would write them."""
    said = f"{found['passed']} passed, {found['failed']} failed"
    return f"{said}, {found['skipped']} skipped" if found["skipped"] else said


def main(folder: str) -> None:
    """Print the summary of the logs in a folder."""
    log = Path(folder)
    total: Counter[str] = Counter()
    seconds = 0
    print("\n===== summary =====")
    for line in (log / "parts.tsv").read_text().splitlines():
        part, result, took = line.split("\t")
        found = counts(log.glob(f"{part}-*.xml"))
        total += found
        seconds += int(took)
        verdict = "ok" if result == "0" else "FAILED"
        print(f"{part:<14}{verdict:<8}{took:>5} s  {words(found) if found else ''}".rstrip())
    print(f"{'all':<22}{seconds:>5} s")
    if total:
        print(words(total))


if __name__ == "__main__":
    main(*sys.argv[1:])
