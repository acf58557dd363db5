"""The results of `lint`, as plain frozen values."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kerasmp.errors import ArgumentError, ArgumentTypeError, with_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Severity: TypeAlias = Literal["error", "warning", "hint"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "hint")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem to fix before training.

    Args:
        severity: "error" if training goes wrong; "warning" if it may go wrong or loses accuracy;
            "hint" if it could be faster or a little safer.
        place: The path of a layer or variable, or the name of the model.
        rule: The id of the rule, as in docs/lint.md.
        reason: What is wrong, in a sentence or two.
        remedy: What to do.

    Example:

    >>> print(Finding("hint", "dense", "sizes", "30 is not a multiple of 8.", "Use 32."))
    hint    dense  [sizes] 30 is not a multiple of 8. Use 32.
    """

    severity: Severity
    place: str
    rule: str
    reason: str
    remedy: str

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ArgumentError(
                "`severity` has an invalid value.",
                received=repr(self.severity),
                expected=f"one of {', '.join(SEVERITIES)}",
                fix='Use "error" if training goes wrong.',
            )

    def __str__(self) -> str:
        return f"{self.severity:7} {self.place}  [{self.rule}] {self.reason} {self.remedy}"


@dataclasses.dataclass(frozen=True)
class LintReport:
    """The findings of `lint`, the worst first. You can iterate over a report and take its length.

    It prints a line for each kind of finding, with the first places and their number.

    Args:
        findings: The findings.

    Example:

    >>> len(LintReport(())), str(LintReport(()))
    (0, 'no findings')
    """

    findings: tuple[Finding, ...]

    def __post_init__(self) -> None:
        given: Any = self.findings
        if not isinstance(given, tuple) or not all(isinstance(each, Finding) for each in given):
            raise ArgumentTypeError(
                "`findings` has an invalid value.",
                received=with_type(given),
                expected="a tuple of Finding objects",
                fix="Call kerasmp.lint(model) to get a report.",
            )

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that are warnings."""
        return self._of("warning")

    @property
    def hints(self) -> tuple[Finding, ...]:
        """The findings that are hints."""
        return self._of("hint")

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.severity == severity)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        return "\n".join(lines(self.findings)) or "no findings"


# So many places are named where a finding has several.
_PLACES = 3


def lines(findings: Iterable[Finding]) -> list[str]:
    """Return a line for each kind of finding: of equal severity, rule and remedy.

    Args:
        findings: The findings.

    Example:

    >>> same = "Its weights are float16.", "Use float32."
    >>> two = [Finding("error", each, "half-master", *same) for each in ("a", "b")]
    >>> lines(two)
    ['error   a and b (2 places)  [half-master] Its weights are float16. Use float32.']
    """
    kinds: dict[tuple[str, str, str], list[Finding]] = {}
    for each in findings:
        # A remedy may name the place, as a whole word: layer "a" is not the "a" of "float32".
        remedy = re.sub(rf"(?<!\w){re.escape(each.place)}(?!\w)", "", each.remedy)
        kinds.setdefault((each.severity, each.rule, remedy), []).append(each)
    return [str(_joined(each)) for each in kinds.values()]


def _joined(findings: list[Finding]) -> Finding:
    # A layer that is called twice has one place.
    first, places = findings[0], list(dict.fromkeys(each.place for each in findings))
    if len(places) == 1:
        return first
    named = (
        ", ".join(places[:_PLACES])
        if places[_PLACES:]
        else " and ".join([", ".join(places[:-1]), places[-1]])
    )
    rest = f" and {len(places) - _PLACES} more" if places[_PLACES:] else ""
    return dataclasses.replace(first, place=f"{named}{rest} ({len(places)} places)")


def sorted_report(findings: list[Finding]) -> LintReport:
    """Return a report without duplicates, the worst findings first, otherwise in the given order.

    Args:
        findings: The findings.
    """
    unique = dict.fromkeys(findings)
    return LintReport(tuple(sorted(unique, key=lambda each: SEVERITIES.index(each.severity))))
