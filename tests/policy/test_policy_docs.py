"""The page about policies does what it shows."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "policy.md"


def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert " on " in capsys.readouterr().out
