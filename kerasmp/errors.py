"""Exceptions and warnings. Each says what was received, what was expected and how to fix it."""

from __future__ import annotations

import difflib
import numbers
from typing import TYPE_CHECKING

import keras
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

# Another library's message is cut to this length.
_MAX_LENGTH = 150
# A `repr` in a message is cut to this length.
_MAX_REPR = 100


class KerasMPError(Exception):
    """Base class of all exceptions that kerasmp raises.

    Args:
        problem: One sentence that says what is wrong.
        received: The offending value, as its `repr` or a short description.
        expected: What would have been accepted.
        fix: What the user should do now.

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
    """A dtype or policy does not exist, or Keras cannot express it."""


class LossScaleError(KerasMPError, ValueError):
    """A loss scale, a schedule or a wrapped optimizer has a value that cannot work."""


class ArgumentTypeError(KerasMPError, TypeError):
    """An argument has the wrong type."""


class LossScaleTypeError(LossScaleError, ArgumentTypeError):
    """A setting of a schedule or of a wrapped optimizer has the wrong type."""


class ArgumentError(KerasMPError, ValueError):
    """Arguments do not fit each other, for example in their shapes."""


class BackendError(KerasMPError, RuntimeError):
    """kerasmp cannot work on this Keras backend, or at this point of a step."""


class NotCompiledError(KerasMPError, RuntimeError):
    """A function needs a compiled model and received one that is not compiled."""


class DatasetError(KerasMPError, FileNotFoundError):
    """A data set is not on this disk. kerasmp never downloads one."""


class OutputError(KerasMPError, OSError):
    """A folder or a file cannot be written."""


class MissingDependencyError(KerasMPError, ImportError):
    """An optional package that this feature needs is not installed."""


class KerasMPWarning(UserWarning):
    """Base class of all warnings that kerasmp gives."""


class PolicyWarning(KerasMPWarning):
    """A policy has less effect than it says, or a model ignores it or is not safe under it."""


class LossScaleWarning(KerasMPWarning):
    """Loss scaling is missing, does not move any more, or is about to lose values."""


def check_bool(name: str, value: object, error: type[KerasMPError] = ArgumentTypeError) -> None:
    """Raise an error unless an argument is a bool. A string such as "no" would count as True.

    Args:
        name: The name of the argument.
        value: Its value. A bool of NumPy is accepted too.
        error: The class of the error.

    Raises:
        ArgumentTypeError: If `value` is not a bool.

    Example:

    >>> check_bool("dry_run", True)
    """
    if not isinstance(value, bool | np.bool_):
        raise error(
            f"`{name}` has an invalid value.",
            received=repr(value),
            expected="True or False",
            fix=f"Pass {name}=True or {name}=False.",
        )


def check_integer(name: str, value: object, error: type[KerasMPError], least: int = 1) -> int:
    """Check that an argument is an integer, and return it as an int.

    Args:
        name: The name of the argument.
        value: Its value. An integer of NumPy is accepted too.
        error: The class of the error for an integer that is too small.
        least: The smallest integer that is accepted.

    Raises:
        ArgumentTypeError: If `value` is not an integer.

    Example:

    >>> check_integer("epochs", 3, ArgumentError)
    3
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        error = ArgumentTypeError
    elif int(value) >= least:
        return int(value)
    raise error(
        f"`{name}` has an invalid value.",
        received=repr(value),
        expected=f"an integer of at least {least}",
        fix=f"The smallest choice is {name}={least}.",
    )


def check_model(model: object, use: str, kind: type = keras.Layer, *, fix: str) -> None:
    """Raise an error unless an argument is a Keras model.

    Args:
        model: The argument.
        use: What only a model can be used for, such as "be saved".
        kind: The class that it must be an instance of; `keras.Model` where a layer is not enough.
        fix: What the user should do now.

    Raises:
        ArgumentTypeError: If `model` is not a Keras model.

    Example:

    >>> check_model(keras.Sequential(), "be saved", fix="Pass the model first, then the path.")
    """
    if not isinstance(model, kind):
        raise ArgumentTypeError(
            f"Only a Keras model can {use}.",
            received=f"{model!r}, a {type(model).__name__}",
            expected="a keras.Model",
            fix=fix,
        )


def with_type(value: object) -> str:
    """Return the `repr` of a value, shortened if it is long, and its type.

    Example:

    >>> with_type("half")
    "'half' of type str"
    """
    text = repr(value)
    if len(text) > _MAX_REPR:
        text = f"{text[:_MAX_REPR]}..."
    return f"{text} of type {type(value).__name__}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the nearest known word, or an empty string.

    Example:

    >>> did_you_mean("mixed_flaot16", ["mixed_float16", "float32"])
    'Did you mean "mixed_float16"?'
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f'Did you mean "{near[0]}"?' if near else ""


def first_line(error: Exception) -> str:
    r"""Return the message of another library's exception, in one short line.

    Example:

    >>> first_line(TypeError("x has type float32.\nIt was expected to be float16."))
    'TypeError: x has type float32'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # AutoGraph of TensorFlow puts its traceback in front of the message.
    line = lines[-1] if lines[0].startswith("in user code") else lines[0]
    name = "" if isinstance(error, KerasMPError) else f"{type(error).__name__}: "
    return (name + line)[:_MAX_LENGTH].rstrip(" .:")
