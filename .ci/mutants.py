"""Plant small faults in the package, one at a time, and check that the tests find them.

`.ci/mutants.toml` defines the faults. `mutants.py [NAME ...]` plants the named ones, or all, each
in a copy of the files that git tracks or would add, and runs the tests concerned up to the first
failure:

- `--set quick`: the unit tests on NumPy; if they pass, the quick tests on TensorFlow.
- `--set full`: the tests that are marked full, on TensorFlow.
- `--set everything`: all tests on TensorFlow except unit tests, whatever their marks; for a tree
  without marks, such as the baseline.

First the same tests run without a fault and must pass, since otherwise "killed" would mean nothing.
`--no-control` skips that for a tree whose tests are known to pass.

`--results` stores one line of JSON for each run. A fault with a stored result is not run again
unless it has changed, so that an interrupted run can continue. Remove the file when the tests have
changed. Errors are tried again, and so are timeouts, which prove nothing: a test that hangs fails
by pytest's own limit.

`--list` prints the faults, and fails if the text of one is missing. `--table BASE QUICK [FULL]`
prints the results of several such files side by side.
"""

import argparse
import ast
import concurrent.futures as cf
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FAULTS = Path(__file__).with_name("mutants.toml")

# Keras backend and pytest expression of marks, in the order of the runs.
SETS = {
    "quick": (("numpy", "unit"), ("tensorflow", "not full")),
    "full": (("tensorflow", "full"),),
    "everything": (("tensorflow", ""),),
}
# Exit codes of pytest.
PASSED, FAILED, INTERRUPTED, NO_TESTS = 0, 1, 2, 5

# The user's shell must not change a result.
FORGOTTEN = {"PYTHONPATH", "VIRTUAL_ENV", "KERAS_BACKEND", "PYTEST_ADDOPTS"}
SETTINGS = {"MPLBACKEND": "Agg", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}

# A run without a fault runs all tests, and may take this many times as long.
CONTROL_PATIENCE = 4

# The id of a test in the list at the end of pytest's output. Its brackets may contain blanks.
NAMED = re.compile(r"^(?:FAILED|ERROR) (\S+?\[.*?\]|\S+)(?: - |$)", re.MULTILINE)

# Find the package here and in a child process, without the time of an import.
WHERE = "import importlib.util as u; print(u.find_spec('kerasmp').origin, flush=True)"
WHERE_TWICE = f"import subprocess, sys; {WHERE}; subprocess.run([sys.executable, '-c', {WHERE!r}])"


# --------------------------------------------------------------------------------------- faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """A small fault, defined as a replacement of text.

    Args:
        name: The name.
        idea: What goes wrong for the user, whatever the code looks like.
        file: The file, relative to the root of the tree.
        before: The text to replace, which occurs in the file once.
        after: The new text.
        tests: The folders or files of tests concerned, relative to the root of the tree.
    """

    name: str
    idea: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    @property
    def package(self) -> str:
        """The subpackage that contains the fault."""
        return Path(self.file.removeprefix("kerasmp/")).parts[0].removesuffix(".py")

    @property
    def hash(self) -> str:
        """A hash of everything that may change a result."""
        return digest(self.file, self.before, self.after, *self.tests)


def digest(*texts: str) -> str:
    """Return a short hash of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def read_faults() -> list[Fault]:
    """Return the faults of `.ci/mutants.toml`; exit if one is malformed."""
    entries = tomllib.loads(FAULTS.read_text(encoding="utf-8"))["fault"]
    fields = {field.name for field in dataclasses.fields(Fault)}
    faults = []
    for entry in entries:
        called = entry.get("name", entry)
        if entry.keys() != fields:
            sys.exit(f"{FAULTS.name}: {called} needs {sorted(fields)}, but has {sorted(entry)}.")
        fault = Fault(**entry | {"tests": tuple(entry["tests"])})
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fault.name):
            sys.exit(f"{FAULTS.name}: write the name {called!r} as words-with-hyphens.")
        if fault.before == fault.after or not fault.tests:
            sys.exit(f"{FAULTS.name}: {called} changes nothing, or names no tests.")
        faults.append(fault)
    twice = [name for name, number in Counter(f.name for f in faults).items() if number > 1]
    if twice:
        sys.exit(f"{FAULTS.name}: names must be unique, but {', '.join(twice)} occurs twice.")
    return faults


def chosen(faults: list[Fault], names: list[str]) -> list[Fault]:
    """Return the faults with these names, or all if none is given; exit if one is unknown."""
    known = [fault.name for fault in faults]
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"No fault is called {', '.join(unknown)}. --list shows the names.")
    return [fault for fault in faults if not names or fault.name in names]


def planted(fault: Fault, tree: Path) -> str:
    """Return the text of the file with the fault in it.

    Raises:
        ValueError: If its text is not in the file exactly once, or the result is not Python.
    """
    path = tree / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = text.count(fault.before)
    if found != 1:
        raise ValueError(
            f"{fault.name}: its text occurs {found} times in {fault.file}, but must occur once.\n"
            f"  Write it again with the same idea: {fault.idea}"
        )
    mutant = text.replace(fault.before, fault.after)
    try:
        ast.parse(mutant)
    except SyntaxError as error:
        raise ValueError(f"{fault.name}: it makes {fault.file} invalid Python: {error}") from error
    return mutant


def check_faults(faults: list[Fault], tree: Path) -> None:
    """Exit with a list if faults cannot be planted in a tree, or their tests are missing."""
    problems = []
    for fault in faults:
        try:
            planted(fault, tree)
        except ValueError as error:
            problems.append(str(error))
        problems += [
            f"{fault.name}: {tests} does not exist; name the tests concerned in {FAULTS.name}."
            for tests in fault.tests
            if not (tree / tests).exists()
        ]
    if problems:
        sys.exit("\n".join(problems))


# -------------------------------------------------------------------------------------- results


class Results:
    """The results of faults and controls, in a file of JSON lines.

    Args:
        path: The file, which may be missing.
        commit: The commit of the tree, stored with each record.
    """

    def __init__(self, path: Path, commit: str) -> None:
        self._path = path
        self._commit = commit
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str, str], dict[str, Any]] = {}
        for record in read_results(path) if path.exists() else []:
            self._known[record["fault"], record["hash"], record["set"]] = record

    def settled(self, fault: str, fingerprint: str, tests: str) -> dict[str, Any] | None:
        """Return the result of a fault with a set of tests; None if there is none, or an error."""
        record = self._known.get((fault, fingerprint, tests))
        return None if record is None or record["verdict"] == "error" else record

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append a record to the file and return it."""
        record |= {"commit": self._commit}
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of results; exit if a line is not a record."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            [record[key] for key in ("fault", "hash", "set", "verdict")]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{path}: line {number} is not a result. Remove it, and the fault runs again.")
        records.append(record)
    return records


# ----------------------------------------------------------------------------------------- runs


class Processes:
    """Start processes, and end them together with their children."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._ended = False

    def run(
        self, command: list[str], folder: Path, environment: dict[str, str], seconds: float
    ) -> tuple[int | None, str]:
        """Return the exit code, or None after a timeout, and the output.

        Raises:
            CancelledError: If `end_all` was called.
        """
        if self._ended:
            raise cf.CancelledError
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(  # noqa: S603 - the user names the interpreter
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process.pid)
            code = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(seconds)
            finally:
                self._end(process.pid)
                process.wait()
            if self._ended:
                raise cf.CancelledError
            output.seek(0)
            return code, output.read().decode(errors="replace")

    def end_all(self) -> None:
        """End all processes and their children, and start no more."""
        self._ended = True
        for group in list(self._running):
            self._end(group)

    def _end(self, group: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._running.discard(group)


class Runner:
    """Run tests in copies of a tree.

    Args:
        python: The interpreter.
        tree: A folder that does not change meanwhile.
        name: The set of tests.
        seconds: The time limit for a fault.
        results: Where results are stored.
    """

    def __init__(
        self, python: str, tree: Path, name: str, seconds: float, results: Results
    ) -> None:
        self.processes = Processes()
        self._python = python
        self._tree = tree
        self._set = name
        self._seconds = seconds
        self._results = results

    def check_import(self) -> None:
        """Exit unless the interpreter and its children import kerasmp from a copy."""
        with self._copy() as copy:
            # Not in the copy: the working directory would be found first.
            code, said = self.processes.run(
                [self._python, "-c", WHERE_TWICE], copy.parent, self._environment(copy), 60
            )
            expected = str(copy / "kerasmp" / "__init__.py")
            if code != 0 or said.split() != [expected] * 2:
                sys.exit(
                    f"{self._python} does not import kerasmp from a copy of the tree, although "
                    f"PYTHONPATH names it. Its output:\n{said}"
                )

    def control(self, tests: str) -> dict[str, Any]:
        """Return the result of tests without a fault, which must pass."""
        name, fingerprint = f"without a fault: {tests}", digest(tests)
        known = self._results.settled(name, fingerprint, self._set)
        if known is not None:
            return known
        with self._copy() as copy:
            found = self._tested(copy, (tests,), self._seconds * CONTROL_PATIENCE)
        found["verdict"] = "passed" if found["verdict"] == "alive" else "error"
        return self._add(name, fingerprint, found)

    def fault(self, fault: Fault, controls: list[cf.Future[dict[str, Any]]]) -> dict[str, Any]:
        """Return the result of a fault, after its controls have passed."""
        known = self._results.settled(fault.name, fault.hash, self._set)
        if known is not None:
            return known
        failed = [c.result() for c in controls if c.result()["verdict"] != "passed"]
        if failed:
            said = ", ".join(f"{c['fault']} ({c['killed_by']})" for c in failed)
            found = {"verdict": "error", "seconds": 0, "killed_by": "", "said": f"failed {said}"}
            return self._add(fault.name, fault.hash, found)
        with self._copy() as copy:
            mutant = planted(fault, copy)
            (copy / fault.file).write_text(mutant, encoding="utf-8")
            found = self._tested(copy, fault.tests, self._seconds)
        return self._add(fault.name, fault.hash, found)

    def _add(self, name: str, fingerprint: str, found: dict[str, Any]) -> dict[str, Any]:
        record = {"fault": name, "hash": fingerprint, "set": self._set, **found}
        by = f" by {found['killed_by']}" if found["killed_by"] else ""
        said = f"\n{found['said']}" if found["said"] else ""
        print(f"{name}: {found['verdict']}{by}, {found['seconds']} s{said}", flush=True)
        return self._results.add(record)

    def _tested(self, copy: Path, tests: tuple[str, ...], seconds: float) -> dict[str, Any]:
        started = time.monotonic()
        verdict, by, said = "alive", "", ""
        for backend, marks in SETS[self._set]:
            left = seconds - (time.monotonic() - started)
            code, output = self.processes.run(
                [
                    *(self._python, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"),
                    f"--basetemp={copy.with_name('tmp')}",
                    *("-m", marks, *tests),
                ],
                copy,
                self._environment(copy) | {"KERAS_BACKEND": backend},
                max(left, 1),
            )
            named = NAMED.search(output.rpartition("short test summary info")[2])
            by = named[1] if named else ""
            if code is None:
                verdict, said = "error", f"took longer than {seconds:.0f} s, see --seconds"
            elif named and code in {FAILED, INTERRUPTED}:  # the latter while tests are collected
                verdict = "killed"
            elif code not in {PASSED, NO_TESTS}:
                verdict, said = "error", f"pytest ended with {code}:\n{output[-2000:]}"
            if verdict != "alive":
                break
        took = round(time.monotonic() - started)
        return {"verdict": verdict, "seconds": took, "killed_by": by, "said": said}

    def _environment(self, copy: Path) -> dict[str, str]:
        own = {"PYTHONPATH": str(copy), "KERAS_HOME": str(copy.with_name("keras"))}
        kept = {key: value for key, value in os.environ.items() if key not in FORGOTTEN}
        return kept | SETTINGS | own

    @contextlib.contextmanager
    def _copy(self) -> Any:
        with tempfile.TemporaryDirectory(prefix="kerasmp-fault-") as folder:
            copy = Path(folder).resolve() / "tree"
            shutil.copytree(self._tree, copy, symlinks=True)
            yield copy


def git(tree: Path, *arguments: str) -> str:
    """Return the output of git for a tree; exit if it is not a checkout."""
    said = subprocess.run(["git", *arguments], cwd=tree, capture_output=True, check=False)  # noqa: S603, S607 - the user's git
    if said.returncode:
        sys.exit(f"{tree} is not a git checkout: {said.stderr.decode(errors='replace')}")
    return said.stdout.decode()


def snapshot(tree: Path, folder: Path) -> Path:
    """Copy the files of a tree that git tracks or would add into a folder, and return it."""
    listed = git(
        tree, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"
    )
    for name in filter(None, listed.split("\0")):
        source, target = tree / name, folder / name
        if source.is_file():  # not if it is deleted but still tracked
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder


def run_all(
    faults: list[Fault], runner: Runner, jobs: int, *, control: bool
) -> list[dict[str, Any]]:
    """Return the result of each fault, with `jobs` at a time; controls run first."""
    controls: dict[str, cf.Future[dict[str, Any]]] = {}
    futures = []
    with cf.ThreadPoolExecutor(jobs) as pool:
        try:
            for fault in faults:
                for tests in fault.tests if control else ():
                    if tests not in controls:
                        controls[tests] = pool.submit(runner.control, tests)
                # They are submitted before the fault, so that it does not wait forever.
                own = [controls[tests] for tests in fault.tests if control]
                futures.append(pool.submit(runner.fault, fault, own))
            return [future.result() for future in futures]
        except BaseException:  # interrupts too
            pool.shutdown(wait=False, cancel_futures=True)
            runner.processes.end_all()
            raise


# --------------------------------------------------------------------------------------- tables


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def head(*cells: str) -> str:
    """Return the first two rows of a Markdown table."""
    return f"{row(*cells)}\n{row(*('---' for _ in cells))}"


def summary(faults: list[Fault], found: list[dict[str, Any]]) -> str:
    """Return the results of faults as a table and counts."""
    rows = [
        row(fault.name, fault.package, record["verdict"], record["killed_by"] or "-")
        for fault, record in zip(faults, found, strict=True)
    ]
    counts = Counter(record["verdict"] for record in found)
    said = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
    table = [head("fault", "package", "verdict", "killed by"), *rows]
    return "\n".join([*table, "", f"{len(found)} faults: {said}"])


def side_by_side(faults: list[Fault], paths: list[Path]) -> str:
    """Return a table of the current faults with their results in up to three files."""
    columns = [
        {(r["fault"], r["hash"]): r["verdict"] for r in read_results(path)} for path in paths
    ]
    titles = ("baseline", "quick set", "full")[: len(columns)]
    rows = [
        row(fault.name, fault.idea, *(c.get((fault.name, fault.hash), "-") for c in columns))
        for fault in faults
    ]
    return "\n".join([head("fault", "idea", *titles), *rows])


# ----------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fault; default: all")
    parser.add_argument("--python", default=sys.executable, help="the interpreter for the tests")
    parser.add_argument(
        "--tree", type=Path, default=ROOT, help="the checkout to plant the faults in"
    )
    parser.add_argument("--set", choices=SETS, default="quick", help="which tests; default: quick")
    parser.add_argument("--results", type=Path, help="default: .ci/mutants-SET.jsonl")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time; default: 2")
    parser.add_argument(
        "--seconds", type=float, default=900, help="time limit for a fault; default: 900"
    )
    parser.add_argument(
        "--no-control", action="store_true", help="the tests are known to pass without a fault"
    )
    parser.add_argument("--list", action="store_true", help="print and check the faults")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="FILE", help="print BASE QUICK [FULL]"
    )
    given = parser.parse_args()
    if given.table and len(given.table) not in {2, 3}:
        parser.error("--table takes two files of results, BASE QUICK, or three, BASE QUICK FULL.")
    if given.jobs < 1:
        parser.error("--jobs must be at least 1.")
    return given


def main() -> None:
    """Run the command line; exit with 1 unless all faults are killed."""
    given = arguments()
    faults = chosen(read_faults(), given.names)
    if given.table:
        print(side_by_side(faults, given.table))
        return
    tree = given.tree.resolve()
    if not (tree / "kerasmp").is_dir():
        sys.exit(f"{tree} is not a checkout of kerasmp. Name one with --tree.")
    check_faults(faults, tree)
    if given.list:
        print("\n".join(f"{fault.name} ({fault.package}): {fault.idea}" for fault in faults))
        print(f"{len(faults)} faults")
        return
    results = given.results or FAULTS.with_name(f"mutants-{given.set}.jsonl")
    # On SIGTERM end the child processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended."))
    # An absolute path, without following links, which would leave the virtual environment.
    python = shutil.which(given.python)
    if python is None:
        sys.exit(f"The interpreter {given.python} does not exist. Name one with --python.")
    with tempfile.TemporaryDirectory(prefix="kerasmp-faults-") as folder:
        runner = Runner(
            os.path.abspath(python),  # noqa: PTH100 - Path.absolute keeps "..", resolve follows links
            snapshot(tree, Path(folder)),
            given.set,
            given.seconds,
            Results(results, git(tree, "describe", "--always", "--dirty", "--exclude=*").strip()),
        )
        runner.check_import()
        found = run_all(faults, runner, given.jobs, control=not given.no_control)
    print()
    print(summary(faults, found))
    if any(record["verdict"] != "killed" for record in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
