"""Plant small faults in the product, one at a time, and see whether the tests notice.

`.ci/mutants.toml` holds the faults. `mutants.py [NAME ...]` plants those named, or all, each in a
copy of the files that git knows or would add, and runs the tests of the packages concerned, up to
the first that fails:

- `--set quick`: the unit tests on NumPy; if the fault lives on, the quick tests on TensorFlow.
- `--set full`: the tests that are marked full, on TensorFlow.
- `--set everything`: all tests on TensorFlow, whatever their marks, but for the unit tests; for a
  tree that has none, as the baseline is.

Before that, the same tests run without a fault, and must pass, or "killed" would mean nothing.
`--no-control` leaves that out, for a tree whose tests are known to pass.

What is known is kept in `--results`, a line of JSON for each run. A fault that is in there, and has
not changed since, is not run again, so that a run that was stopped goes on where it was. Remove the
file when the tests have changed. What ended in an error is tried again; so is what took too long,
which says nothing: a test that hangs fails by pytest's own limit.

`--list` prints the faults, and fails if the text of one is gone. `--table BASE QUICK [FULL]` prints
what such files say of each fault, side by side.
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

# Keras's backend and pytest's expression of marks, one step after the other.
SETS = {
    "quick": (("numpy", "unit"), ("tensorflow", "not full")),
    "full": (("tensorflow", "full"),),
    "everything": (("tensorflow", ""),),
}
# What pytest's exit code says.
PASSED, FAILED, INTERRUPTED, NO_TESTS = 0, 1, 2, 5

# What the user's shell may hold must not change a result.
FORGOTTEN = {"PYTHONPATH", "VIRTUAL_ENV", "KERAS_BACKEND", "PYTEST_ADDOPTS"}
SETTINGS = {"MPLBACKEND": "Agg", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}

# A run without a fault goes through all tests, and may take so many times as long.
CONTROL_PATIENCE = 4

# A test's id in the list that ends pytest's output. There may be blanks in its brackets.
NAMED = re.compile(r"^(?:FAILED|ERROR) (\S+?\[.*?\]|\S+)(?: - |$)", re.MULTILINE)

# Imports nothing, and so takes no time: where is it, here and in a process that this one starts?
WHERE = "import importlib.util as u; print(u.find_spec('kerasmp').origin, flush=True)"
WHERE_TWICE = f"import subprocess, sys; {WHERE}; subprocess.run([sys.executable, '-c', {WHERE!r}])"


# --------------------------------------------------------------------------------------- faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """A small fault, as a replacement of text.

    Args:
        name: Its name.
        idea: What goes wrong for the user, whatever the code looks like.
        file: The file, from the root of the tree.
        before: The text that is replaced; it is in the file once.
        after: What stands there instead.
        tests: The folders or files of tests concerned, from the root of the tree.
    """

    name: str
    idea: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    @property
    def package(self) -> str:
        """The package of the product that it is in."""
        return Path(self.file.removeprefix("kerasmp/")).parts[0].removesuffix(".py")

    @property
    def hash(self) -> str:
        """Changes with all that may change a result."""
        return digest(self.file, self.before, self.after, *self.tests)


def digest(*texts: str) -> str:
    """Return a short hash of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def read_faults() -> list[Fault]:
    """Return the faults of `.ci/mutants.toml`; exit if one is not well written."""
    entries = tomllib.loads(FAULTS.read_text(encoding="utf-8"))["fault"]
    fields = {field.name for field in dataclasses.fields(Fault)}
    faults = []
    for entry in entries:
        called = entry.get("name", entry)
        if entry.keys() != fields:
            sys.exit(f"{FAULTS.name}: {called} needs {sorted(fields)}, and has {sorted(entry)}.")
        fault = Fault(**entry | {"tests": tuple(entry["tests"])})
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fault.name):
            sys.exit(f"{FAULTS.name}: write the name {called!r} as words-with-hyphens.")
        if fault.before == fault.after or not fault.tests:
            sys.exit(f"{FAULTS.name}: {called} changes nothing, or names no tests.")
        faults.append(fault)
    twice = [name for name, number in Counter(f.name for f in faults).items() if number > 1]
    if twice:
        sys.exit(f"{FAULTS.name}: names must be unique, and {', '.join(twice)} is there twice.")
    return faults


def chosen(faults: list[Fault], names: list[str]) -> list[Fault]:
    """Return the faults of these names, all if there are none; exit if one is unknown."""
    known = [fault.name for fault in faults]
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"No fault is called {', '.join(unknown)}. --list shows the names.")
    return [fault for fault in faults if not names or fault.name in names]


def planted(fault: Fault, tree: Path) -> str:
    """Return the text of the file with the fault in it.

    Raises:
        ValueError: If it has no place there.
    """
    path = tree / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = text.count(fault.before)
    if found != 1:
        raise ValueError(
            f"{fault.name}: its text is {found} times in {fault.file}, and must be there once.\n"
            f"  Plant it again with the same idea: {fault.idea}"
        )
    mutant = text.replace(fault.before, fault.after)
    try:
        ast.parse(mutant)
    except SyntaxError as error:
        raise ValueError(f"{fault.name}: with it, {fault.file} is no Python: {error}") from error
    return mutant


def refuse_misfits(faults: list[Fault], tree: Path) -> None:
    """Exit, saying which, if a fault has no place in a tree, or its tests are not there."""
    misfits = []
    for fault in faults:
        try:
            planted(fault, tree)
        except ValueError as error:
            misfits.append(str(error))
        misfits += [
            f"{fault.name}: there is no {tests}; name the tests concerned in {FAULTS.name}."
            for tests in fault.tests
            if not (tree / tests).exists()
        ]
    if misfits:
        sys.exit("\n".join(misfits))


# -------------------------------------------------------------------------------------- results


class Results:
    """What is known of faults and controls, in a file of JSON lines.

    Args:
        path: The file; it need not be there.
        commit: What the tree is, kept with each record.
    """

    def __init__(self, path: Path, commit: str) -> None:
        self._path = path
        self._commit = commit
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str, str], dict[str, Any]] = {}
        for record in read_results(path) if path.exists() else []:
            self._known[record["fault"], record["hash"], record["set"]] = record

    def settled(self, fault: str, fingerprint: str, tests: str) -> dict[str, Any] | None:
        """Return what is known of this fault under this set; None if nothing, or an error."""
        record = self._known.get((fault, fingerprint, tests))
        return None if record is None or record["verdict"] == "error" else record

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append a record, at once, and return it."""
        record |= {"commit": self._commit}
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of results; exit if a line is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            [record[key] for key in ("fault", "hash", "set", "verdict")]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{path}: line {number} is no result. Remove it, the fault runs again.")
        records.append(record)
    return records


# ----------------------------------------------------------------------------------------- runs


class Processes:
    """Starts processes, and ends what they have started with them."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._ended = False

    def run(
        self, command: list[str], folder: Path, environment: dict[str, str], seconds: float
    ) -> tuple[int | None, str]:
        """Return the exit code, None if the time was up, and what was printed.

        Raises:
            CancelledError: If all have been ended.
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
        """End all that runs, and all that it has started, for good."""
        self._ended = True
        for group in list(self._running):
            self._end(group)

    def _end(self, group: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._running.discard(group)


class Runner:
    """Runs tests in copies of a tree.

    Args:
        python: The interpreter.
        tree: A folder that nothing changes meanwhile.
        name: The set of tests.
        seconds: How long a fault may take.
        results: Takes what comes of it.
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
        """Exit unless the interpreter, and what it starts, import the product from a copy."""
        with self._copy() as copy:
            # Not in the copy: the working folder would be found first.
            code, said = self.processes.run(
                [self._python, "-c", WHERE_TWICE], copy.parent, self._environment(copy), 60
            )
            expected = str(copy / "kerasmp" / "__init__.py")
            if code != 0 or said.split() != [expected] * 2:
                sys.exit(
                    f"{self._python} does not import kerasmp from a copy of the tree, though "
                    f"PYTHONPATH names it. It says:\n{said}"
                )

    def control(self, tests: str) -> dict[str, Any]:
        """Return what the tests say without a fault; they must pass."""
        name, fingerprint = f"without a fault: {tests}", digest(tests)
        known = self._results.settled(name, fingerprint, self._set)
        if known is not None:
            return known
        with self._copy() as copy:
            found = self._tested(copy, (tests,), self._seconds * CONTROL_PATIENCE)
        found["verdict"] = "passed" if found["verdict"] == "alive" else "error"
        return self._add(name, fingerprint, found)

    def fault(self, fault: Fault, controls: list[cf.Future[dict[str, Any]]]) -> dict[str, Any]:
        """Return what the tests say of a fault, once those without one have passed."""
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
    """Return what git says of a tree; exit if it is no checkout."""
    said = subprocess.run(["git", *arguments], cwd=tree, capture_output=True, check=False)  # noqa: S603, S607 - the user's git
    if said.returncode:
        sys.exit(f"{tree} is no checkout of git: {said.stderr.decode(errors='replace')}")
    return said.stdout.decode()


def snapshot(tree: Path, folder: Path) -> Path:
    """Copy the files of a tree that git knows or would add into a folder, and return that."""
    listed = git(
        tree, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"
    )
    for name in filter(None, listed.split("\0")):
        source, target = tree / name, folder / name
        if source.is_file():  # what is deleted and not committed is not
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder


def run_all(
    faults: list[Fault], runner: Runner, jobs: int, *, control: bool
) -> list[dict[str, Any]]:
    """Return what the tests say of each fault, so many at a time; controls, if any, come first."""
    controls: dict[str, cf.Future[dict[str, Any]]] = {}
    futures = []
    with cf.ThreadPoolExecutor(jobs) as pool:
        try:
            for fault in faults:
                for tests in fault.tests if control else ():
                    if tests not in controls:
                        controls[tests] = pool.submit(runner.control, tests)
                # They began before it, so that it does not wait for ever.
                own = [controls[tests] for tests in fault.tests if control]
                futures.append(pool.submit(runner.fault, fault, own))
            return [future.result() for future in futures]
        except BaseException:  # an interrupt, too
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
    """Return what came of faults, as a table and counts."""
    rows = [
        row(fault.name, fault.package, record["verdict"], record["killed_by"] or "-")
        for fault, record in zip(faults, found, strict=True)
    ]
    counts = Counter(record["verdict"] for record in found)
    said = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
    table = [head("fault", "package", "verdict", "killed by"), *rows]
    return "\n".join([*table, "", f"{len(found)} faults: {said}"])


def side_by_side(faults: list[Fault], paths: list[Path]) -> str:
    """Return what up to three files of results say of each fault as it is now, as a table."""
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
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fault; default: all")
    parser.add_argument("--python", default=sys.executable, help="of an environment for the tests")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to plant them in")
    parser.add_argument("--set", choices=SETS, default="quick", help="which tests; default: quick")
    parser.add_argument("--results", type=Path, help="default: .ci/mutants-SET.jsonl")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time; default: 2")
    parser.add_argument(
        "--seconds", type=float, default=900, help="that a fault may take; default: 900"
    )
    parser.add_argument(
        "--no-control", action="store_true", help="the tests are known to pass without a fault"
    )
    parser.add_argument("--list", action="store_true", help="print and check the faults")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="FILE", help="BASE QUICK [FULL], to print"
    )
    given = parser.parse_args()
    if given.table and len(given.table) not in {2, 3}:
        parser.error("--table takes two files of results, BASE QUICK, or three, BASE QUICK FULL.")
    if given.jobs < 1:
        parser.error("--jobs is at least 1.")
    return given


def main() -> None:
    """Do what the command line asks for; exit with 1 unless all faults are killed."""
    given = arguments()
    faults = chosen(read_faults(), given.names)
    if given.table:
        print(side_by_side(faults, given.table))
        return
    tree = given.tree.resolve()
    if not (tree / "kerasmp").is_dir():
        sys.exit(f"{tree} is no checkout of kerasmp. Name one with --tree.")
    refuse_misfits(faults, tree)
    if given.list:
        print("\n".join(f"{fault.name} ({fault.package}): {fault.idea}" for fault in faults))
        print(f"{len(faults)} faults")
        return
    results = given.results or FAULTS.with_name(f"mutants-{given.set}.jsonl")
    # So that the processes end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended."))
    # By a path that leads there from any folder; to resolve the link would leave the environment.
    python = shutil.which(given.python)
    if python is None:
        sys.exit(f"There is no interpreter {given.python}. Name one with --python.")
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
