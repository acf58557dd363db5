"""The entry point of the command `kerasmp`, which hides TensorFlow's startup log.

This module is outside the package, because importing anything from the package imports Keras and
its framework, and TensorFlow logs while it loads. `import kerasmp` does not change the log.
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

# It filters stderr in another process, so that no line is lost if the framework aborts this one.
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
    """Hide log lines of these levels in stderr. TensorFlow ignores its settings while it loads."""
    line = rf"[{levels}]\d{{4}} \d\d:\d\d:|WARNING: All log messages before absl::InitializeLog"
    relay = subprocess.Popen(  # noqa: S603 - this Python runs the text above
        [sys.executable, "-ISc", _RELAY, line], stdin=subprocess.PIPE
    )
    assert relay.stdin is not None
    stderr = os.dup(2)
    os.dup2(relay.stdin.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        relay.stdin.close()
        relay.wait()


def _is_not_retracing(record: logging.LogRecord) -> bool:
    """Return False for the warning about retracing, which the models of the demo trigger."""
    return "triggered tf.function retracing" not in record.getMessage()


def main() -> None:
    """Run the command with TensorFlow's log limited to TF_CPP_MIN_LOG_LEVEL."""
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # The log's letters for information, warnings and errors. Fatal errors are always shown.
    hidden = "IWE"[: int(level)] if level.isdigit() else ""
    if hidden:
        logging.getLogger("tensorflow").addFilter(_is_not_retracing)
    # Without a stderr, there is nothing to hide.
    with _log_hidden(hidden) if hidden and sys.stderr else contextlib.nullcontext():
        from kerasmp import cli
    cli.main()


if __name__ == "__main__":
    main()
