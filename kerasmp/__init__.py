"""Mixed-precision training for Keras 3 in which every step is either right or explained."""

from kerasmp import errors, layers, loss_scale, ops
from kerasmp.callbacks import OverflowMonitor
from kerasmp.conversion import convert, save_for_stock_keras
from kerasmp.diagnosis import Calibration, Diagnosis, Finding, LintReport, calibrate, diagnose, lint
from kerasmp.loss_scale import (
    DynamicLossScale,
    FixedLossScale,
    LogMaxLossScale,
    LossScale,
    NoLossScale,
    UnderflowLossScale,
)
from kerasmp.model import Model, Sequential
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.policy import (
    LayerPolicies,
    Policy,
    global_policy,
    policy_scope,
    recommend_policy,
    set_global_policy,
)

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Diagnosis",
    "DynamicLossScale",
    "Finding",
    "FixedLossScale",
    "LayerPolicies",
    "LintReport",
    "LogMaxLossScale",
    "LossScale",
    "LossScaleOptimizer",
    "Model",
    "NoLossScale",
    "OverflowMonitor",
    "Policy",
    "Sequential",
    "UnderflowLossScale",
    "calibrate",
    "convert",
    "diagnose",
    "errors",
    "global_policy",
    "layers",
    "lint",
    "loss_scale",
    "ops",
    "policy_scope",
    "recommend_policy",
    "save_for_stock_keras",
    "set_global_policy",
]
