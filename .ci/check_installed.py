"""Check an installed kerasmp: its location, its files and its version."""

import importlib.metadata
import sys
from pathlib import Path

import kerasmp

folder = Path(kerasmp.__file__).parent
version = importlib.metadata.version("kerasmp")
problems = [
    problem
    for wrong, problem in [
        (not folder.is_relative_to(sys.prefix), f"kerasmp was imported from {folder}"),
        (not (folder / "py.typed").is_file(), "py.typed is missing"),
        (kerasmp.__version__ != version, f"{kerasmp.__version__} is not {version}"),
        (any((folder.parent / name).exists() for name in ("tests", "examples")), "tests installed"),
    ]
    if wrong
]
if problems:
    sys.exit(f"The installed kerasmp is wrong: {'; '.join(problems)}.")
print(f"kerasmp {version} in {folder}")
