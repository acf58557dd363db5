"""Reads and writes the measurements behind a page of docs/: a JSON file beside it, by run."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def read(path):
    """Return the measurements, by run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path, data, page):
    """Write the measurements and the page that was generated from them."""
    path.write_text(compact(data), encoding="utf-8")
    path.with_suffix(".md").write_text(page, encoding="utf-8")


def compact(data):
    """Return JSON with one line per row, so that a diff shows the rows that changed."""
    parts = []
    for run, entry in sorted(data.items()):
        head = {key: value for key, value in entry.items() if key != "rows"}
        rows = ",\n".join("   " + json.dumps(row) for row in entry["rows"])
        parts.append(f'  "{run}": {json.dumps(head)[:-1]}, "rows": [\n{rows}\n  ]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
