"""Where the command `kerasmp` begins: TensorFlow's log of its own start is kept out of it.

It lies beside the package, since whatever is imported from the package imports Keras, and so the
framework, which logs while it is loaded. Who imports `kerasmp` keeps the log as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# A process of its own, which passes on what is said even if the framework ends this one at once.
_RELAY = """
import re, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
hidden = re.compile(sys.argv[1].encode())
for line in sys.stdin.buffer:
    if not hidden.match(line):
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
"""


@contextlib.contextmanager
def _log_hidden(levels: str) -> Iterator[None]:
    """Keep lines of these levels out of stderr: while it is loaded TensorFlow heeds no setting."""
    line = rf"[{levels}]\d{{4}} \d\d:\d\d:|WARNING: All log messages before absl::InitializeLog"
    relay = subprocess.Popen(  # noqa: S603 - this Python, and what is written above
        [sys.executable, "-ISc", _RELAY, line], stdin=subprocess.PIPE
    )
    assert relay.stdin is not None
    kept = os.dup(2)
    os.dup2(relay.stdin.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        relay.stdin.close()
        relay.wait()


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a record is more than that several models, as in the demo, were compiled."""
    return "triggered tf.function retracing" not in record.getMessage()


def main() -> None:
    """Run the command, with no more of TensorFlow's log than TF_CPP_MIN_LOG_LEVEL asks for."""
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # What the log calls information, warnings and errors; what is fatal is always shown.
    hidden = "IWE"[: int(level)] if level.isdigit() else ""
    if hidden:
        logging.getLogger("tensorflow").addFilter(_is_news)
    # Without a stderr there is nothing to hide.
    with _log_hidden(hidden) if hidden and sys.stderr else contextlib.nullcontext():
        from kerasmp import cli
    cli.main()


if __name__ == "__main__":
    main()
