"""What a conversion did, layer by layer, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kerasmp.backend.keras_graph import policy_of
from kerasmp.conversion.order import refuse_out_of_order
from kerasmp.errors import PolicyError
from kerasmp.policy.apply import take_back
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kerasmp.conversion.order import Conversion
    from kerasmp.policy import Policy
    from kerasmp.policy.apply import Undo
    from kerasmp.policy.layer_policies import LayerPolicies

_UNKNOWN = "unknown"
_HEAD = ("layer", "class", "before", "after", "why")
_MEASURED = ("multiply-adds", "in half", "activations", "casts")
_STEP = {"count": 1000, "bytes": 1024}


class ConvertedLayer(NamedTuple):
    """What `convert` did, or would do, to one layer.

    Args:
        layer: The layer.
        path: Keras's path of the layer; where Keras gives it none, the holder's and its name.
        class_name: The name of its class, as it is now.
        before: The name of the Keras policy that it followed.
        after: The name of the Keras policy that it follows.
        reason: The rule that says so; "the policy" where there is none.
        replaced: The name of the stock class that it had, if it became a layer of ours.
        cost: What it does in one call on the sample; None without a sample, and where the sample
            did not reach it.
    """

    layer: Any
    path: str
    class_name: str
    before: str
    after: str
    reason: str
    replaced: str | None = None
    cost: Any = None


class ConversionReport:
    """What `convert` did, or would do; `str()` is a table with one line for each layer.

    While it is kept, so is all that `restore` needs; after a conversion of variables that is a copy
    of their old values.

    Args:
        model: The model.
        policy: The policy with its rules; None where policies of single layers were given.
        rows: One row for the model and for each layer in it, holders before what they hold.
        layer_policies: The policies of all layers, as text that can be applied again.
        notes: What else there is to say, a sentence each.
        undo: What puts everything back.
        conversion: What tells it from other conversions; None after a dry run.
    """

    def __init__(  # noqa: PLR0913 - one for each attribute
        self,
        *,
        model: Any,
        policy: Policy | None,
        rows: Iterable[ConvertedLayer],
        layer_policies: LayerPolicies,
        notes: Iterable[str] = (),
        undo: Undo | None = None,
        conversion: Conversion | None = None,
    ) -> None:
        self.model = model
        self.policy = policy
        self.rows = tuple(rows)
        self.layer_policies = layer_policies
        self.notes = tuple(notes)
        self._undo = [] if undo is None else undo
        self._conversion = conversion

    @property
    def multiply_adds(self) -> Mapping[str, int] | None:
        """Multiply-adds of one call on the sample, by the dtype of what is multiplied.

        None without a sample, and where a layer multiplies in a way that could not be seen.
        """
        costs = [row.cost for row in self.rows if row.cost is not None]
        if not costs or not all(cost.known for cost in costs):
            return None
        total: dict[str, int] = {}
        for cost in costs:
            for dtype, count in cost.multiply_adds.items():
                total[dtype] = total.get(dtype, 0) + count
        return total

    @property
    def half_share(self) -> float | None:
        """The share of the multiply-adds that is done in float16 or bfloat16, 0 to 1.

        None where `multiply_adds` is, and where there are none.
        """
        counts = self.multiply_adds
        total = sum(counts.values()) if counts else 0
        if not counts or not total:
            return None
        return sum(counts.get(half, 0) for half in HALVES) / total

    @property
    def activation_bytes(self) -> int | None:
        """Bytes of the outputs of all layers for the sample; None without one."""
        return self._sum("activation_bytes")

    @property
    def cast_bytes(self) -> int | None:
        """Bytes that casts between float dtypes write in one call; None without a sample."""
        return self._sum("cast_bytes")

    def restore(self) -> None:
        """Put everything back: policies, classes, variables' dtypes, optimizer; once.

        Weights keep what training has made of them since. Of several conversions of a layer the
        last one is to be undone first, also where its report was dropped. After a dry run nothing
        happens.

        Raises:
            PolicyError: If it was called before, if a later conversion comes first, or if a layer
                was quantised since. Nothing has changed then.
        """
        if self._conversion is not None:
            refuse_out_of_order(self._conversion, [row.layer for row in self.rows])
            self._refuse_quantised()
        try:
            take_back(self._undo)
        finally:  # after an interrupt the report would say that it is undone already
            take_back(self._undo)

    def _refuse_quantised(self) -> None:
        for row in self.rows:
            policy = policy_of(row.layer)
            if policy.quantization_mode is not None and policy.name != row.after:
                raise PolicyError(
                    "A layer was quantised since the conversion, and has no such weights any more.",
                    received=f'"{row.path}" under "{policy.name}"',
                    expected=f'"{row.after}"',
                    fix="Load the model anew, or restore before model.quantize(...).",
                )

    def __str__(self) -> str:
        return _table(self)

    def _sum(self, name: str) -> int | None:
        costs = [row.cost for row in self.rows if row.cost is not None]
        return sum(getattr(cost, name) for cost in costs) if costs else None


def _table(report: ConversionReport) -> str:
    """Return a report as text: what there is in all, one line for each layer, and the notes."""
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
