"""Checks of a model before it trains. They return plain results, which `report` formats."""

from kerasmp.diagnosis.calibrate import Calibration, calibrate
from kerasmp.diagnosis.diagnose import diagnose
from kerasmp.diagnosis.lint import lint
from kerasmp.diagnosis.result import Diagnosis
from kerasmp.probe import Finding, LintReport

__all__ = [
    "Calibration",
    "Diagnosis",
    "Finding",
    "LintReport",
    "calibrate",
    "diagnose",
    "lint",
]
