"""What frameworks write to stderr from C++, kept out of the progress bars."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from typing import TYPE_CHECKING

from kerasmp.errors import KerasMPError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Lines that begin as absl's log does, and the two lines that come with TensorFlow's first one.
_NOTE = re.compile(
    r"[IWE]\d{4} \d{2}:?\d{2}|[IWE]0000 |WARNING: All log messages before absl|"
    r"To enable the following instructions:"
)


@contextlib.contextmanager
def stderr_held_back() -> Iterator[None]:
    """Hold stderr back while the block runs; afterwards show it without the frameworks' log lines.

    TensorFlow logs from C++ before any setting of ours is heard, so only the file descriptor
    itself can keep it quiet. If the block raises something unforeseen, all is shown.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        everything = True
        try:
            yield
            everything = False
        except (KerasMPError, KeyboardInterrupt):
            everything = False
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
            sys.stderr.write(text if everything else without_notes(text))
            sys.stderr.flush()


def without_notes(text: str) -> str:
    r"""Return a text without the lines that are a framework's log.

    Args:
        text: What was written to stderr.

    Example:

    >>> without_notes("I0000 00:00:1.5 12 port.cc:153] oneDNN is on.\nUserWarning: mind this\n")
    'UserWarning: mind this\n'
    """
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not _NOTE.match(line))
