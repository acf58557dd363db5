"""The report of a conversion, layer by layer, which can undo it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from kerasmp.backend.keras_graph import policy_of
from kerasmp.conversion.order import refuse_out_of_order
from kerasmp.errors import PolicyError
from kerasmp.policy.apply import take_back
from kerasmp.policy.spec import HALVES
from kerasmp.probe.finding import lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kerasmp.conversion.order import Conversion
    from kerasmp.policy import Policy
    from kerasmp.policy.apply import Undo
    from kerasmp.policy.layer_policies import LayerPolicies
    from kerasmp.probe.finding import Finding

_UNKNOWN = "unknown"
_HEAD = ("layer", "class", "before", "after")
_MEASURED = ("multiply-adds", "in half", "activations", "casts")
_STEP = {"count": 1000, "bytes": 1024}


class ConvertedLayer(NamedTuple):
    """What `convert` did, or would do, to one layer.

    Args:
        layer: The layer.
        path: Keras's path of the layer. If Keras gives it none, its holder's path and its name.
        class_name: The name of its present class.
        before: The name of its Keras policy before.
        after: The name of its Keras policy after.
        reason: The rule that decided this; "the policy" if no rule did.
        replaced: The name of its stock class before, if it became a kerasmp layer.
        cost: What it does in one call on the sample. None without a sample, or if the sample did
            not reach it.
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

    A report holds what `restore` needs; after a conversion of variables that is a copy of their old
    values.

    Args:
        model: The model.
        policy: The policy with its rules; None if `LayerPolicies` were given.
        rows: One row for the model and for each layer in it, holders before the layers they hold.
        layer_policies: The policies of all layers, as text that can be applied again.
        notes: Further remarks, a sentence each.
        findings: What the values of the sample show in the converted model; empty without a sample.
        undo: The functions that undo the conversion.
        conversion: Identifies the conversion; None after a dry run.
    """

    def __init__(  # noqa: PLR0913 - one for each attribute
        self,
        *,
        model: Any,
        policy: Policy | None,
        rows: Iterable[ConvertedLayer],
        layer_policies: LayerPolicies,
        notes: Iterable[str] = (),
        findings: Iterable[Finding] = (),
        undo: Undo | None = None,
        conversion: Conversion | None = None,
    ) -> None:
        self.model = model
        self.policy = policy
        self.rows = tuple(rows)
        self.layer_policies = layer_policies
        self.notes = tuple(notes)
        self.findings = tuple(findings)
        self._undo = [] if undo is None else undo
        self._conversion = conversion

    @property
    def multiply_adds(self) -> Mapping[str, int] | None:
        """Multiply-adds of one call on the sample, by the dtype of the factors.

        None without a sample, or if a layer multiplies in a way that could not be counted.
        """
        if not self._costs or not all(cost.known for cost in self._costs):
            return None
        total: Counter[str] = Counter()
        for cost in self._costs:
            total.update(cost.multiply_adds)
        return dict(total)

    @property
    def half_share(self) -> float | None:
        """The share of the multiply-adds in float16 or bfloat16, 0 to 1.

        None if `multiply_adds` is None or empty.
        """
        return _half_share(self.multiply_adds or {})

    @property
    def activation_bytes(self) -> int | None:
        """Bytes of the outputs of all layers for the sample; None without one."""
        return self._sum("activation_bytes")

    @property
    def cast_bytes(self) -> int | None:
        """Bytes that casts between float dtypes write in one call; None without a sample."""
        return self._sum("cast_bytes")

    def restore(self) -> None:
        """Undo the conversion, once: policies, classes, dtypes of variables, and the optimizer.

        Weights keep the values that training has given them since. If a layer was converted more
        than once, the last conversion must be undone first, even if its report was dropped. After a
        dry run nothing happens.

        Raises:
            PolicyError: If it was called before, if a later conversion must be undone first, or if
                a layer was quantized since. Nothing has changed then.
        """
        if self._conversion is not None:
            refuse_out_of_order(self._conversion, [row.layer for row in self.rows])
            self._refuse_quantized()
        take_back(self._undo)

    def _refuse_quantized(self) -> None:
        for row in self.rows:
            policy = policy_of(row.layer)
            if policy.quantization_mode is not None and policy.name != row.after:
                raise PolicyError(
                    "A layer was quantized since the conversion, and no longer has float weights.",
                    received=f'"{row.path}" under "{policy.name}"',
                    expected=f'"{row.after}"',
                    fix="Load the model again, or call restore() before model.quantize(...).",
                )

    @property
    def _costs(self) -> list[Any]:
        return [row.cost for row in self.rows if row.cost is not None]

    def _sum(self, name: str) -> int | None:
        return sum(getattr(cost, name) for cost in self._costs) if self._costs else None

    def __str__(self) -> str:
        head = (*_HEAD, *(_MEASURED if self._costs else ()), "why")
        body = [
            (
                *(row.path, _class(row), row.before, row.after),
                *(_figures(row) if self._costs else ()),
                row.reason,
            )
            for row in self.rows
        ]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        findings = ["", *lines(self.findings)] if self.findings else []
        return "\n".join([*self._summary(), "", *_aligned([head, *body]), *notes, *findings])

    def _summary(self) -> list[str]:
        counts = Counter(row.after for row in self.rows[1:])
        of_each = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
        changed = sum(row.before != row.after for row in self.rows[1:])
        multiply_adds = self.multiply_adds
        total = None if multiply_adds is None else sum(multiply_adds.values())
        costs = (
            f"{_UNKNOWN if self.half_share is None else f'{self.half_share:.1%}'} of "
            f"{amount(total, 'count')} multiply-adds in half precision, "
            f"{amount(self.activation_bytes, 'bytes')} of activations, "
            f"{amount(self.cast_bytes, 'bytes')} written by casts, in one call on the sample"
            if self._costs
            else "multiply-adds and bytes unknown: give convert a sample"
        )
        return [f"{self.model.name}: {of_each}; {changed} changed", costs]


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


def _class(row: ConvertedLayer) -> str:
    if row.replaced is None:
        return row.class_name
    was = "" if row.replaced == row.class_name else f", was {row.replaced}"
    return f"{row.class_name} (kerasmp{was})"


def _figures(row: ConvertedLayer) -> tuple[str, str, str, str]:
    cost = row.cost
    if cost is None:
        return (_UNKNOWN,) * 4
    share = _half_share(cost.multiply_adds)
    return (
        amount(sum(cost.multiply_adds.values()) if cost.known else None, "count"),
        ("-" if share is None else f"{share:.0%}") if cost.known else _UNKNOWN,
        amount(cost.activation_bytes, "bytes"),
        amount(cost.cast_bytes, "bytes"),
    )


def _half_share(multiply_adds: Mapping[str, int]) -> float | None:
    total = sum(multiply_adds.values())
    return sum(multiply_adds.get(half, 0) for half in HALVES) / total if total else None


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
