"""Tests use public names, so that the internals can be rewritten.

Only one test file, the one about it, and one helper, for all others, may use something private: a
module that is not a package, except `kerasmp.errors`; a name that a package does not export; a name
of kerasmp with an underscore.
"""

import ast
import collections
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import kerasmp

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parents[1]
FOUND = list(pkgutil.walk_packages(kerasmp.__path__, "kerasmp."))
PACKAGES = {"kerasmp", "kerasmp.errors", *(module.name for module in FOUND if module.ispkg)}
EXPORTED = {name: set(dir(importlib.import_module(name))) for name in ["kerasmp.errors"]} | {
    name: set(importlib.import_module(name).__all__) for name in PACKAGES - {"kerasmp.errors"}
}


PYTHONS = {"_replace", "_asdict", "_fields", "_make"}  # of named tuples, and public


def parsed(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def defined(tree):
    """Return the private names that a file defines: functions, classes, globals, attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) if is_private(name):
                yield name


OURS = {
    name
    for file in Path(kerasmp.__file__).parent.rglob("*.py")
    for name in defined(parsed(file))
    if is_private(name) and name not in PYTHONS
}


def behind(dotted):
    """Return the private part of `kerasmp.a.b.c`: a module, or a name that is not exported."""
    parts = dotted.split(".")
    if parts[0] != "kerasmp" or parts[-1].startswith("__"):
        return None
    for end in range(2, len(parts) + 1):
        name = ".".join(parts[:end])
        package = ".".join(parts[: end - 1])
        if name not in PACKAGES:
            return None if parts[end - 1] in EXPORTED[package] else name
    return None


def dotted(node):
    """Return the dotted name of an expression, or None."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{dotted(value)}.{name}"
    return ""


def private_uses(tree):
    """Return the private names of kerasmp that a test file uses."""
    ours = {"kerasmp": "kerasmp"}
    used, own = set(), set(defined(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                used |= {behind(each.name) for each in names}
                ours |= {x.asname: x.name for x in names if x.asname and x.name in PACKAGES}
            case ast.ImportFrom(module=str(module), names=names, level=0) if (
                module.partition(".")[0] == "kerasmp"
            ):
                used |= {behind(f"{module}.{each.name}") for each in names}
                used |= {each.name for each in names if is_private(each.name)}
                whole = {each.asname or each.name: f"{module}.{each.name}" for each in names}
                ours |= {name: path for name, path in whole.items() if path in PACKAGES}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if dotted(node).partition(".")[0] in ours:
                first, _, rest = dotted(node).partition(".")
                used |= {behind(f"{ours[first]}.{rest}")}
        match node:
            case ast.Attribute(attr=name) if name in OURS - own:
                used |= {name}
            case ast.Constant(value=str(text)) if re.fullmatch(r"kerasmp(\.\w+)+", text):
                used |= {behind(text)}
            case ast.Call(func=function, args=[_, ast.Constant(value=str(name)), *_]):
                if dotted(function).endswith(("setattr", "getattr", "patch.object")):
                    used |= {name} & OURS
    return used - {None}


def test_what_is_private_is_used_by_one_file_of_tests_and_one_helper():
    files = collections.defaultdict(list)
    for file in sorted(set(TESTS.rglob("*.py")) - {Path(__file__)}):
        for use in private_uses(parsed(file)):
            kind = "helper" if file.parent.name == "helpers" else "file of tests"
            files[use, kind].append(str(file.relative_to(TESTS)))
    shared = [f"{x}, {kind}: {', '.join(by)}" for (x, kind), by in files.items() if len(by) > 1]
    assert not shared, "\n".join(["Private, and used by more than one:", *sorted(shared)])


@pytest.mark.parametrize(
    ("code", "uses"),
    [
        ("from kerasmp.policy import Policy, policy_scope", set()),
        ("from kerasmp.errors import did_you_mean, PolicyError", set()),
        ("import kerasmp as mp; mp.layers.Dense(1, mp.Policy); mp.errors.PolicyError", set()),
        ("from kerasmp.backend import keras_internals", {"kerasmp.backend.keras_internals"}),
        ("from kerasmp.backend.keras_internals import x", {"kerasmp.backend.keras_internals"}),
        ("import kerasmp.policy.safe", {"kerasmp.policy.safe"}),
        ("import kerasmp as mp; mp.policy.safe.RULES", {"kerasmp.policy.safe"}),
        ("from kerasmp import layers; layers.from_stock.x", {"kerasmp.layers.from_stock"}),
        ("patch('kerasmp.demo.run.load'); patch('kerasmp.demo.run_demo')", {"kerasmp.demo.run"}),
        ("from kerasmp.layers import no_such", {"kerasmp.layers.no_such"}),
        ("report._undo.close(); model._no_name_of_ours", {"_undo"}),
        ("class Own:\n    def go(self):\n        self._undo = 1\n        return self._undo", set()),
        ("monkeypatch.setattr(report, '_undo', 1)", {"_undo"}),
    ],
)
def test_private_uses_are_found(code, uses):
    assert private_uses(ast.parse(code)) == uses
