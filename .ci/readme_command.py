"""Print a command that README.md marks: `python3 .ci/readme_command.py test`."""

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
COMMAND = re.compile(r"<!-- command: (\w+) -->\s*```bash\n(.*?)\n```", re.DOTALL)


def commands(text: str) -> dict[str, str]:
    """Return the marked commands of a README by their name.

    Raises:
        ValueError: If a name is used twice, or a block is not exactly one line.
    """
    found: dict[str, str] = {}
    for name, block in COMMAND.findall(text):
        if name in found:
            raise ValueError(f"README.md marks two commands as {name!r}. Keep one.")
        if not block.strip() or "\n" in block:
            raise ValueError(f"README.md's command {name!r} must be exactly one line.")
        found[name] = block.strip()
    return found


def main(name: str) -> None:
    """Print the command of that name, or exit with a message that lists the names."""
    found = commands(README.read_text(encoding="utf-8"))
    if name not in found:
        sys.exit(
            f"README.md has no command {name!r}, only {sorted(found)}. "
            f"Mark it with a line <!-- command: {name} --> before a ```bash block."
        )
    print(found[name])


if __name__ == "__main__":
    main(*sys.argv[1:])
