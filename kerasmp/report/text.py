"""Formats numbers, in the same way for the terminal and the page."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kerasmp.demo import RunResult

NONE = "-"
COLUMNS = (
    "policy",
    "accuracy",
    "loss",
    "time per step",
    "skipped",
    "final scale",
    "memory",
)


def number(value: float | None, pattern: str, unit: str = "") -> str:
    """Format a number: None as a dash, and "inf" or "nan" without a unit.

    Args:
        value: The number.
        pattern: A format specification, such as ".3f".
        unit: A suffix, such as " ms".

    Example:

    >>> number(0.125, ".1%"), number(None, ".1%"), number(float("nan"), ".1%")
    ('12.5%', '-', 'nan')
    """
    if value is None:
        return NONE
    return format(value, pattern) + unit if math.isfinite(value) else str(value)


def scale(value: float | None) -> str:
    """Format a loss scale, as a power of two if it is one.

    Example:

    >>> scale(32768.0), scale(1000.0), scale(None)
    ('2^15', '1000', '-')
    """
    if value is None:
        return NONE
    fraction, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if fraction == 0.5 else f"{value:g}"  # noqa: PLR2004 - a power of two


def kibibytes(value: int) -> str:
    """Format a number of bytes in KiB or MiB.

    Example:

    >>> kibibytes(2048), kibibytes(5 * 2**20)
    ('2 KiB', '5.0 MiB')
    """
    kib = value / 1024
    return f"{kib:.0f} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"  # noqa: PLR2004


def cells(run: RunResult) -> tuple[str, ...]:
    """Return the table row of a run, with a cell for each of `COLUMNS`."""
    milliseconds = None if math.isnan(run.seconds_per_step) else run.seconds_per_step * 1e3
    return (
        run.recipe.name,
        number(run.test_accuracy[-1], ".1%"),
        number(run.test_loss[-1], ".4f"),
        number(milliseconds, ".2f", " ms"),
        number(run.skipped_steps, "d"),
        scale(run.final_scale),
        kibibytes(run.activation_bytes),
    )


def seconds(value: float) -> str:
    """Format a duration.

    Example:

    >>> seconds(3.25), seconds(75.0)
    ('3.2 s', '1 min 15 s')
    """
    if value < 60:  # noqa: PLR2004 - a minute
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def plain(value: object) -> object:
    """Convert a result to JSON values. Numbers that are not finite become None.

    Args:
        value: A result, or a part of one.

    Example:

    >>> plain({"loss": (1.0, float("inf"))})
    {'loss': [1.0, None]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        parts = {name: plain(getattr(value, name)) for name in names}
        return {"type": type(value).__name__, **parts}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
