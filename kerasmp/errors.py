"""Exceptions and warnings: each says what was received, what was expected and how to mend it."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LONGEST = 150  # so much of somebody else's message says what there is to say


class KerasMPError(Exception):
    """Base of every exception that kerasmp raises.

    Args:
        problem: One sentence that says what is wrong.
        received: The offending value, as its `repr` or a short description.
        expected: What would have been accepted.
        fix: What the reader should do now.

    Example:

    >>> str(KerasMPError("Bad scale.", received="0", expected="a number > 0", fix="Pass 1024."))
    'Bad scale. Received: 0. Expected: a number > 0. Pass 1024.'
    """

    def __init__(
        self, problem: str, *, received: str = "", expected: str = "", fix: str = ""
    ) -> None:
        self.received = received
        self.expected = expected
        self.fix = fix
        parts = [
            problem,
            f"Received: {received}." if received else "",
            f"Expected: {expected}." if expected else "",
            fix,
        ]
        super().__init__(" ".join(part for part in parts if part))


class PolicyError(KerasMPError, ValueError):
    """A dtype or policy that does not exist or that Keras cannot express."""


class LossScaleError(KerasMPError, ValueError):
    """A loss scale, a schedule or a wrapped optimizer with a value that cannot work."""


class ArgumentTypeError(KerasMPError, TypeError):
    """An argument of the wrong type."""


class ArgumentError(KerasMPError, ValueError):
    """Arguments that do not fit each other, shapes among them."""


class BackendError(KerasMPError, RuntimeError):
    """A Keras backend, or a place in a step, in which kerasmp cannot work."""


class NotCompiledError(KerasMPError, RuntimeError):
    """Something that needs a compiled model was given one that is not."""


class DatasetError(KerasMPError, FileNotFoundError):
    """A data set that is not on this disk; kerasmp never downloads one."""


class OutputError(KerasMPError, OSError):
    """A folder or file that cannot be written."""


class MissingDependencyError(KerasMPError, ImportError):
    """An optional package that this feature needs is not installed."""


class KerasMPWarning(UserWarning):
    """Base of every warning that kerasmp gives."""


class PolicyWarning(KerasMPWarning):
    """A policy will not do all that it says, or a model ignores it or is not safe under it."""


class LossScaleWarning(KerasMPWarning):
    """Loss scaling is missing, stuck or about to lose something."""


def refuse_no_bool(name: str, value: object) -> None:
    """Raise unless an argument is True or False: a text such as "no" would count as True.

    Args:
        name: The argument.
        value: What it was given; NumPy's bool will do.

    Raises:
        ArgumentTypeError: If it is no bool.

    Example:

    >>> refuse_no_bool("dry_run", True)
    """
    if type(value).__name__ not in {"bool", "bool_"}:
        raise ArgumentTypeError(
            f"`{name}` is a switch.",
            received=f"{value!r} of type {type(value).__name__}",
            expected="True or False",
            fix="Pass True or False.",
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the nearest known word, or an empty string.

    Example:

    >>> did_you_mean("mixed_flaot16", ["mixed_float16", "float32"])
    'Did you mean "mixed_float16"?'
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f'Did you mean "{near[0]}"?' if near else ""


def first_line(error: Exception) -> str:
    r"""Return what somebody else's exception says, in one line that is not long.

    Example:

    >>> first_line(TypeError("x has type float32.\nIt was expected to be float16."))
    'TypeError: x has type float32'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # Where TensorFlow's AutoGraph has put its traceback in front.
    line = lines[-1] if lines[0].startswith("in user code") else lines[0]
    name = "" if isinstance(error, KerasMPError) else f"{type(error).__name__}: "
    return (name + line)[:_LONGEST].rstrip(" .:")
