"""Call a function in one other process, or in several that form a cluster.

Logical devices and clusters are fixed before a framework's first use, so a test cannot set them in
its own process. No process outlives its time: if one fails, or time is up, all are killed.

The child runs this module, with four arguments: the seconds that it may take, `module:function`,
the keyword arguments as JSON, and the file for the result. Without arguments it reads such lists
from standard input, each a line of JSON.
"""

import contextlib
import faulthandler
import importlib
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
HUNG = "Timeout ("  # what faulthandler writes when it ends a process
PORT_TAKEN = re.compile(r"[Aa]ddress already in use|[Ff]ailed to bind|Could not start gRPC server")
ATTEMPTS = 3
# On two idle cores each takes less than half a minute, most of it to start a framework. On busy
# cores the start alone can take that long.
SECONDS = 110


class ProcessError(AssertionError):
    """A process ended without a result."""


class HungError(ProcessError):
    """A process did not end within its time."""


def call(name, *, env=None, seconds=SECONDS, **arguments):
    """Run `name`, as `module:function`, in a new process, and return its result."""
    return _together(name, [arguments], env, time.monotonic() + seconds)[0]


class Kept:
    """A process that answers many calls, for tests that need another process, not a new one.

    Starting a framework takes longer than most calls.
    """

    def __init__(self):
        self._child = None

    def call(self, name, *, seconds=SECONDS, **arguments):
        """Run `name`, as `module:function`, there, and return its result."""
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
                child.communicate(timeout=10)  # it exits at the end of its input
            child.kill()
            child.wait()
            self._directory.cleanup()


def cluster(name, ranks, *, env=None, seconds=SECONDS, **arguments):
    """Run `name` in `ranks` processes, each given `rank` and `ports`; return all results."""
    deadline = time.monotonic() + seconds  # for all attempts together
    for attempt in range(1, ATTEMPTS + 1):
        ports = _free_ports(ranks)
        calls = [{"rank": rank, "ports": ports, **arguments} for rank in range(ranks)]
        try:
            return _together(name, calls, env, deadline)
        except ProcessError as error:
            # Another program may take a port between its choice and its use.
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
            [sys.executable, "-m", "helpers.processes", *arguments],
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
    """Return whether all ended, or one failed, before the deadline."""
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if None not in codes or any(codes):
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------------------- in the child process


def _main(seconds, name, arguments, result):
    # This ends the process even if it waits forever outside Python, or has lost its parent.
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    module, function = name.split(":")
    returned = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    # Renaming makes the file appear only when it is complete.
    unfinished = Path(f"{result}.part")
    unfinished.write_text(json.dumps(returned), encoding="utf-8")
    unfinished.replace(result)
    faulthandler.cancel_dump_traceback_later()


def _serve():
    import keras

    policy = keras.config.dtype_policy()
    for line in sys.stdin:  # which ends with the parent
        _main(*json.loads(line))
        keras.config.set_dtype_policy(policy)
        keras.backend.clear_session(free_memory=False)


if __name__ == "__main__":
    _main(*sys.argv[1:]) if sys.argv[1:] else _serve()
