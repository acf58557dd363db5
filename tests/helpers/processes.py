"""Calls a function in processes of their own: one, or several that talk to each other.

Logical devices and clusters are set before a framework's first use, so a test cannot set them for
itself. No process outlives its time: all are killed when one of them fails or the time is up.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
HUNG = "Timeout ("  # faulthandler's word, when a process ends itself
PORT_TAKEN = re.compile(r"[Aa]ddress already in use|[Ff]ailed to bind|Could not start gRPC server")
ATTEMPTS = 3
# On two cores of their own none needs half a minute, most of it to start a framework. On cores that
# are shared with much else a start alone can take that long.
SECONDS = 110


class ProcessError(AssertionError):
    """A process ended without a result."""


class HungError(ProcessError):
    """A process did not end within its time."""


def call(name, *, env=None, seconds=SECONDS, **arguments):
    """Return what `module:function` of `name` returns in a process of its own."""
    return _together(name, [arguments], env, time.monotonic() + seconds)[0]


class Kept:
    """A process that answers call after call: for what needs another process, not a new one.

    To start a framework takes longer than most of what is asked.
    """

    def __init__(self):
        self._child = None

    def call(self, name, *, seconds=SECONDS, **arguments):
        """Return what `module:function` of `name` returns there."""
        if self._child is None:
            self._directory = tempfile.TemporaryDirectory()
            self._log = Path(self._directory.name, "log")
            self._child = _start([], self._log, None, stdin=subprocess.PIPE)
        result = Path(self._directory.name, "result.json")
        line = json.dumps([seconds, name, json.dumps(arguments), str(result)])
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()
        deadline = time.monotonic() + seconds
        while not result.exists():
            if self._child.poll() is not None or time.monotonic() > deadline:
                self._child.kill()
                said = self._log.read_text(encoding="utf-8", errors="replace")
                self.close()
                raise (HungError if HUNG in said else ProcessError)(said[-6000:])
            time.sleep(0.02)
        returned = json.loads(result.read_text(encoding="utf-8"))
        result.unlink()
        return returned

    def close(self):
        """End the process; the next call starts another."""
        if self._child is not None:
            child, self._child = self._child, None
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=10)  # by the end of its input it ends itself
            child.kill()
            child.wait()
            self._directory.cleanup()


def cluster(name, ranks, *, env=None, seconds=SECONDS, **arguments):
    """Return what the function returns in each of `ranks` processes, given `rank` and `ports`."""
    deadline = time.monotonic() + seconds  # of all attempts together
    for attempt in range(1, ATTEMPTS + 1):
        ports = _free_ports(ranks)
        calls = [{"rank": rank, "ports": ports, **arguments} for rank in range(ranks)]
        try:
            return _together(name, calls, env, deadline)
        except ProcessError as error:
            # Somebody else may take a port between its choice and its use.
            if attempt == ATTEMPTS or not PORT_TAKEN.search(str(error)):
                raise
    raise AssertionError


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _together(name, calls, env, deadline):
    seconds = max(deadline - time.monotonic(), 1)
    with tempfile.TemporaryDirectory() as directory:
        results = [Path(directory, f"{rank}.json") for rank in range(len(calls))]
        logs = [Path(directory, f"{rank}.log") for rank in range(len(calls))]
        children = []
        try:
            for arguments, result, log in zip(calls, results, logs, strict=True):
                child = [str(seconds), name, json.dumps(arguments), str(result)]
                children.append(_start(child, log, env))
            in_time = _wait(children, deadline)
        finally:
            for child in children:
                child.kill()
                child.wait()
        if not all(result.exists() for result in results):
            said = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
            raise (ProcessError if in_time and HUNG not in said else HungError)(said[-6000:])
        return [json.loads(result.read_text(encoding="utf-8")) for result in results]


def _start(arguments, log, env, **more):
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "helpers.child", *arguments],
            cwd=TESTS,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
                **(env or {}),
            },
            stdout=output,
            stderr=output,
            **more,
        )


def _wait(children, deadline):
    """Return whether all have ended, or one has failed, before the time was up."""
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if None not in codes or any(codes):
            return True
        time.sleep(0.05)
    return False
