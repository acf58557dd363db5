"""Keep in .ci/full.tsv when, and at which commit, each part of `.ci/run full` last passed.

`full_record.py PART COMMIT` writes, `full_record.py --show` prints what is known.
"""

import datetime as dt
import sys
from pathlib import Path

FILE = Path(__file__).with_name("full.tsv")


def read() -> dict[str, tuple[str, str]]:
    """Return the day and the commit of each part that has passed."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return {part: (day, commit) for part, day, commit in (line.split("\t") for line in lines)}


def write(part: str, commit: str) -> None:
    """Note that a part has passed today at a commit."""
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    passed = read() | {part: (today, commit)}
    lines = ["\t".join([name, *passed[name]]) for name in sorted(passed)]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(first: str, *others: str) -> None:
    """Write or show, as the module says."""
    if first != "--show":
        write(first, *others)
        return
    print("\nThe parts of `.ci/run full` last passed:")
    for part, (day, commit) in read().items():
        print(f"  {part:<14}{day} at {commit}")


if __name__ == "__main__":
    main(*sys.argv[1:])
