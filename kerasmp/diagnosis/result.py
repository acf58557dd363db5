"""The result of `diagnose`, as plain frozen values."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING, Literal

from kerasmp.probe.compare import LARGEST
from kerasmp.probe.finding import Finding, lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.probe.magnitudes import Magnitudes
    from kerasmp.probe.tape import TensorSummary

# Fewer gradients than this share may vanish at a good scale.
_SHARE = 1e-3
# Smaller gradients do not count. Adam, with an epsilon of 1e-7, makes nothing of them either.
SMALLEST = 2.0**-40
# The powers of two to look at: float32's.
_POWERS = range(-126, 128)
_ROWS = 20
_DIRECTIONS = {"forward": "->", "backward": "<-", "weights": "w"}
_HEADS = ("place", "", "dtype", "smallest", "largest", "to 0", "high", "inf/NaN", "error", "here")


@dataclasses.dataclass(frozen=True)
class Underflow:
    """What float16 does to the gradients of a step, by the loss scale.

    Attributes:
        loss_scale: The loss scale of the step.
        share: The share of gradients that float16 flushes to 0 at this scale. Counted are the
            gradients of all steps that compute in float16, from about 1e-12 on: smaller ones change
            nothing, not even with Adam.
        scale: The smallest power of two as a scale at which it is less than 1 in 1000. None if no
            gradient is in float16.
        largest_scale: The largest power of two as a scale at which none of them overflows.

    Example:

    >>> from kerasmp.probe.magnitudes import magnitudes
    >>> import numpy as np
    >>> underflow(magnitudes(np.array([2.0**-30, 2.0**-8])), 1.0)
    Underflow(loss_scale=1.0, share=0.5, scale=32.0, largest_scale=8388608.0)
    """

    loss_scale: float
    share: float
    scale: float | None
    largest_scale: float | None


def underflow(gradients: Magnitudes, loss_scale: float) -> Underflow:
    """Return what float16 does to gradients, by the loss scale.

    Args:
        gradients: The magnitudes in float32, multiplied by the scale.
        loss_scale: The scale.
    """
    if not gradients.exponents:
        return Underflow(loss_scale, 0.0, None, None)
    scales = [2.0**k for k in _POWERS]
    counting = gradients.at_least(SMALLEST * loss_scale)
    kept = (s for s in scales if counting.vanishing(s / loss_scale) < _SHARE)
    fits = [s for s in scales if gradients.largest * s / loss_scale <= LARGEST["float16"]]
    return Underflow(
        loss_scale,
        counting.vanishing(),
        next(kept, None),
        fits[-1] if fits else None,
    )


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What one training step does in half precision, beside float32.

    It prints a table that fits the terminal, with the places that matter most.

    Attributes:
        findings: What is wrong, the worst first. docs/diagnose.md explains each rule.
        layers: What the tensors look like, from the inputs to the loss and back.
        underflow: What float16 does to the gradients, by the loss scale.
        advice: What to do, the most important first.
        loss: The loss under the policy; None if a train step of the user's own reports none.
        loss_in_float32: The loss in float32, likewise.

    Example:

    >>> nothing = Underflow(1.0, 0.0, None, None)
    >>> print(Diagnosis((), (), nothing, (), 0.25, 0.25).advice)
    ()
    """

    findings: tuple[Finding, ...]
    layers: tuple[TensorSummary, ...]
    underflow: Underflow
    advice: tuple[str, ...]
    loss: float | None
    loss_in_float32: float | None

    def first_nonfinite(self, direction: Literal["forward", "backward"]) -> str | None:
        """Return the first place with inf or NaN under the policy, or None.

        Args:
            direction: "forward" for what layers return, from the inputs to the loss; "backward" for
                gradients, also those of weights, from the loss to the inputs.
        """
        ways = {"forward": ("forward",), "backward": ("backward", "weights")}[direction]
        found = (x.place for x in self.layers if x.nonfinite and x.direction in ways)
        return next(found, None)

    def __str__(self) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        scale = self.underflow
        head = (
            "the train step reports no loss"
            if self.loss is None
            else f"loss {self.loss:.6g}, in float32 {self.loss_in_float32:.6g}"
        )
        if scale.scale is not None:
            head += (
                f"\nloss scale {scale.loss_scale:g}, at which {scale.share:.2%} of the gradients "
                "become 0"
            )
        named = {each.place for each in self.findings}
        rows = _most_important(self.layers, named)
        parts = [head, _table(rows, width)]
        if len(rows) < len(self.layers):
            parts.append(f"{len(self.layers) - len(rows)} more rows are in `layers`.")
        parts += lines(self.findings) or ["no findings"]
        said = {f"{each.place}: {each.remedy}" for each in self.findings}
        parts += [f"- {each}" for each in self.advice if each not in said]
        return "\n".join(parts)


def _most_important(rows: Sequence[TensorSummary], named: set[str]) -> list[TensorSummary]:
    """Return the rows of named places and those with the largest errors, in their order."""

    def rank(row: TensorSummary) -> tuple[bool, float, float]:
        return row.place in named, row.nonfinite + row.flushed, row.began_here

    best = {id(row) for row in sorted(rows, key=rank, reverse=True)[:_ROWS]}
    return [row for row in rows if id(row) in best]


def _table(rows: Sequence[TensorSummary], width: int) -> str:
    cells = [_HEADS, *map(_cells, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEADS))]
    widths[0] = max(10, min(widths[0], width - sum(widths[1:]) - len(widths) + 1))
    return "\n".join(
        " ".join([_end_of(row[0], widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in cells
    )


def _end_of(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else "..." + text[3 - width :]


def _cells(row: TensorSummary) -> tuple[str, ...]:
    return (
        row.place,
        _DIRECTIONS[row.direction],
        row.dtype,
        f"{row.magnitudes.smallest:.1e}",
        f"{row.magnitudes.largest:.1e}",
        *(f"{share:.1%}" if share else "" for share in (row.flushed, row.high, row.nonfinite)),
        f"{row.error:.1e}",
        f"{row.began_here:.1e}",
    )
