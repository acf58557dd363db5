"""Checks of a model before it trains. They return plain results, which `report` formats."""

from kerasmp.diagnosis.lint import lint
from kerasmp.probe import Finding, LintReport

__all__ = ["Finding", "LintReport", "lint"]
