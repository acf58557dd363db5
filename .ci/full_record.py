"""Record in .ci/full.tsv when, and at which commit, each part of `.ci/run full` last passed.

`full_record.py PART COMMIT` writes a record, `full_record.py --show` prints those of all parts, and
`full_record.py --parts` prints the names of the parts.
"""

import datetime as dt
import re
import sys
from pathlib import Path

FILE = Path(__file__).with_name("full.tsv")
TESTS = Path(__file__).parent.parent / "tests"

# A test file with this has tests that are not quick.
MARKED = re.compile(r"\b(mark\.full|helpers\.marks|each_of)\b")


def parts() -> list[str]:
    """Return the folders and files in tests/ with such tests, and the examples."""
    files = (f for f in TESTS.rglob("test_*.py") if MARKED.search(f.read_text(encoding="utf-8")))
    return [*sorted({file.relative_to(TESTS).parts[0] for file in files}), "examples"]


def read() -> dict[str, tuple[str, str]]:
    """Return the date and the commit of each part that has passed."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return {part: (day, commit) for part, day, commit in (line.split("\t") for line in lines)}


def write(part: str, commit: str) -> None:
    """Record that a part has passed today at a commit."""
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    passed = read() | {part: (today, commit)}
    lines = ["\t".join([name, *passed[name]]) for name in sorted(passed)]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(first: str, *others: str) -> None:
    """Run the command line."""
    if first == "--parts":
        print("\n".join(parts()))
    elif first == "--show":
        passed = read()
        print("\nThe parts of `.ci/run full` last passed:")
        for part in parts():
            print(f"  {part:<14}{' at '.join(passed.get(part, ['never']))}")
    else:
        write(first, *others)


if __name__ == "__main__":
    main(*sys.argv[1:])
