"""What lint finds: plain values."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kerasmp.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from collections.abc import Iterator

Severity: TypeAlias = Literal["error", "warning", "hint"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "hint")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to mend before the first step.

    Args:
        severity: "error": training goes wrong; "warning": it may, or loses accuracy; "hint": it
            could be faster, or safer.
        place: The path of a layer or variable, or the name of the model.
        rule: The id of the rule, as in docs/lint.md.
        reason: What is wrong, in one sentence.
        remedy: What to do.

    Example:

    >>> print(Finding("hint", "dense", "sizes", "30 is no multiple of 8.", "Take 32."))
    hint    dense  [sizes] 30 is no multiple of 8. Take 32.
    """

    severity: Severity
    place: str
    rule: str
    reason: str
    remedy: str

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ArgumentError(
                "A finding has no such severity.",
                received=repr(self.severity),
                expected=f"one of {', '.join(SEVERITIES)}",
                fix='What makes training go wrong is an "error".',
            )

    def __str__(self) -> str:
        return f"{self.severity:7} {self.place}  [{self.rule}] {self.reason} {self.remedy}"


@dataclasses.dataclass(frozen=True)
class LintReport:
    """All findings, the worst first. It iterates over them and has their number as length.

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
                "A report is made of findings.",
                received=f"{given!r:.100} of type {type(given).__name__}",
                expected="a tuple of Finding objects",
                fix="kerasmp.lint(model) returns a report.",
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
        return "\n".join(map(str, self.findings)) or "no findings"


def sorted_report(findings: list[Finding]) -> LintReport:
    """Return a report with each finding once, the worst first, otherwise in order.

    Args:
        findings: The findings.
    """
    once = dict.fromkeys(findings)
    return LintReport(tuple(sorted(once, key=lambda each: SEVERITIES.index(each.severity))))
