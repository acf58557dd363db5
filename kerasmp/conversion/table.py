"""The text of a conversion report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kerasmp.conversion.report import ConversionReport, ConvertedLayer

_UNKNOWN = "unknown"
_HEAD = ("layer", "class", "before", "after", "why")
_MEASURED = ("multiply-adds", "in half", "activations", "casts")
_STEP = {"count": 1000, "bytes": 1024}


def table(report: ConversionReport) -> str:
    """Return a report as text: what there is in all, one line for each layer, and the notes.

    Args:
        report: The report.
    """
    measured = any(row.cost is not None for row in report.rows)
    head = (*_HEAD[:4], *_MEASURED, _HEAD[4]) if measured else _HEAD
    body = [_cells(row, measured=measured) for row in report.rows]
    return "\n".join([*_summary(report), "", *_aligned([head, *body]), *_listed(report.notes)])


def amount(number: int | None, unit: str) -> str:
    """Return a number with three digits and a prefix: "1.21 M" of counts, "1.15 MiB" of bytes.

    Args:
        number: The number; None is "unknown".
        unit: "count" or "bytes".

    Example:

    >>> amount(1_210_000, "count"), amount(1536, "bytes"), amount(7, "bytes"), amount(None, "count")
    ('1.21 M', '1.50 KiB', '7 B', 'unknown')
    """
    if number is None:
        return _UNKNOWN
    value, step, prefixes = float(number), _STEP[unit], iter("KMGTP")
    prefix = ""
    while value >= step:
        value, prefix = value / step, next(prefixes)
    figure = f"{value:.3g}" if not prefix or value >= 100 else f"{value:#.3g}"  # noqa: PLR2004 - three digits
    suffix = {"count": prefix, "bytes": f"{prefix}iB" if prefix else "B"}[unit]
    return f"{figure} {suffix}".rstrip()


def _summary(report: ConversionReport) -> list[str]:
    counts: dict[str, int] = {}
    for row in report.rows[1:]:
        counts[row.after] = counts.get(row.after, 0) + 1
    of_each = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    changed = sum(row.before != row.after for row in report.rows[1:])
    share = report.half_share
    in_half = _UNKNOWN if share is None else f"{share:.1%}"
    measured = any(row.cost is not None for row in report.rows)
    total = sum((report.multiply_adds or {}).values()) if report.multiply_adds is not None else None
    known = (
        f"{in_half} of {amount(total, 'count')} multiply-adds in half precision, "
        f"{amount(report.activation_bytes, 'bytes')} of activations, "
        f"{amount(report.cast_bytes, 'bytes')} written by casts, in one call on the sample"
        if measured
        else "multiply-adds and bytes unknown: give convert a sample"
    )
    return [f"{report.model.name}: {of_each}; {changed} changed", known]


def _cells(row: ConvertedLayer, *, measured: bool) -> tuple[str, ...]:
    front = (row.path, _class(row), row.before, row.after)
    if not measured:
        return (*front, row.reason)
    return (*front, *_figures(row), row.reason)


def _class(row: ConvertedLayer) -> str:
    if row.replaced is None:
        return row.class_name
    was = "" if row.replaced == row.class_name else f", was {row.replaced}"
    return f"{row.class_name} (kerasmp{was})"


def _figures(row: ConvertedLayer) -> tuple[str, str, str, str]:
    cost = row.cost
    if cost is None:
        return (_UNKNOWN,) * 4
    total = sum(cost.multiply_adds.values())
    half = sum(cost.multiply_adds.get(name, 0) for name in HALVES)
    products = (amount(total, "count"), f"{half / total:.0%}" if total else "-")
    return (
        *(products if cost.known else (_UNKNOWN, _UNKNOWN)),
        amount(cost.activation_bytes, "bytes"),
        amount(cost.cast_bytes, "bytes"),
    )


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _listed(notes: Iterable[str]) -> list[str]:
    lines = [f"- {note}" for note in notes]
    return ["", *lines] if lines else []
