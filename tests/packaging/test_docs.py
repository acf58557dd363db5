"""The Python blocks of README.md and docs/ run, each page in a separate process.

A block after `<!-- not run: reason -->` is left out.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: .+? -->\s*)?^```python[^\n]*\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?!\w+:)([^)#\s]+)")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

QUICK = ["README.md", "docs/guide.md"]

RUN = """
import json, sys
for page, blocks in json.load(sys.stdin).items():
    names = {"__name__": "__main__"}
    for first_line, code in blocks:
        exec(compile("\\n" * first_line + code, page, "exec"), names)
"""


def blocks(text):
    """Return (lines before it, code) for each block of a page that runs."""
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in BLOCK.finditer(text)
        if not match["skip"]
    ]


def name(page):
    return str(page.relative_to(ROOT))


def run(pages, folder):
    given = {str(page): blocks(page.read_text(encoding="utf-8")) for page in pages}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(given),
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.backend("tensorflow")
def test_the_pages_that_a_newcomer_reads_run(tmp_path):
    run([ROOT / page for page in QUICK], tmp_path)


@pytest.mark.full
@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))], ids=name
)
def test_page_runs(page, tmp_path):
    run([page], tmp_path)


@pytest.mark.unit
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    lost = [
        target
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not lost


@pytest.mark.unit
def test_every_page_is_in_the_table_of_contents():
    listed = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index.md"} <= listed


@pytest.mark.unit
def test_blocks_are_found_with_their_lines_and_marked_ones_left_out():
    left_out = "<!-- not run: slow -->\n```python\nb\n```\n"
    text = f"# T\n\n```python\na = 1\n```\n{left_out}```bash\nc\n```\n"
    assert blocks(text) == [(3, "a = 1\n")]


@pytest.mark.unit
def test_every_example_names_its_backend():
    example = re.compile(r'\A"""[^"]*^Backend: (tensorflow|jax|torch|any)$', re.MULTILINE)
    files = sorted((ROOT / "examples").glob("*.py"))
    assert files
    assert not [name(file) for file in files if not example.match(file.read_text(encoding="utf-8"))]
