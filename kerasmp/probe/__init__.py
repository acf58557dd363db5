"""Looks at values: a batch in float32 and under the model's policy, compared step by step."""

from kerasmp.probe.finding import Finding, LintReport
from kerasmp.probe.findings import probe_findings

__all__ = ["Finding", "LintReport", "probe_findings"]
