"""Checks of a model before it trains. They return plain results, which `report` formats."""

from kerasmp.diagnosis.finding import Finding, LintReport
from kerasmp.diagnosis.lint import lint

__all__ = ["Finding", "LintReport", "lint"]
