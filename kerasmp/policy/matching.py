"""Whether rules that name layers by path find any."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from kerasmp.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kerasmp.policy.assign import Assignment
    from kerasmp.policy.policy import Policy

_SHOWN = 3


def check_patterns(rows: Iterable[Assignment], policy: Policy) -> None:
    """Raise where a pattern matches the path of no layer.

    Args:
        rows: What `assign` returned.
        policy: The policy with its rules.

    Raises:
        PolicyError: With the paths that come nearest.
    """
    paths = [row.path for row in rows]
    for pattern in (key for key in policy.rules if isinstance(key, str)):
        if not any(pattern == path or re.fullmatch(pattern, path) for path in paths):
            near = _near(pattern, paths)
            raise PolicyError(
                "A rule's pattern matches the path of no layer in the model.",
                received=repr(pattern),
                expected="a regular expression that matches a layer's whole path"
                + (f", such as {', '.join(map(repr, near))}" if near else ""),
                fix="print(convert(model, dry_run=True)) shows all paths.",
            )


def unmatched_classes(rows: Iterable[Assignment], policy: Policy) -> list[str]:
    """Return the names of the layer classes in the rules of which the model has no layer.

    Args:
        rows: What `assign` returned.
        policy: The policy with its rules.
    """
    layers = [row.layer for row in rows]
    classes = [key for key in policy.rules if isinstance(key, type)]
    return [cls.__name__ for cls in classes if not any(isinstance(layer, cls) for layer in layers)]


def _near(pattern: str, paths: list[str]) -> list[str]:
    within = [path for path in paths if re.search(pattern, path)]  # "head" for "head/.*"
    similar = difflib.get_close_matches(pattern, paths, n=_SHOWN, cutoff=0.4)
    return list(dict.fromkeys([*within, *similar]))[:_SHOWN]
