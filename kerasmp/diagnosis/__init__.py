"""Where float16 fails, told before and after it does: plain results, which `report` formats."""

from kerasmp.diagnosis.finding import Finding, LintReport
from kerasmp.diagnosis.lint import lint

__all__ = ["Finding", "LintReport", "lint"]
