"""How the loss is scaled: frozen schedules, each a pure `init` and `update`, no framework state."""

from kerasmp.loss_scale.base import LossScale, resolve
from kerasmp.loss_scale.dynamic import DynamicLossScale
from kerasmp.loss_scale.fixed import FixedLossScale, NoLossScale
from kerasmp.loss_scale.log_max import LogMaxLossScale
from kerasmp.loss_scale.underflow import UnderflowLossScale

__all__ = [
    "DynamicLossScale",
    "FixedLossScale",
    "LogMaxLossScale",
    "LossScale",
    "NoLossScale",
    "UnderflowLossScale",
    "resolve",
]
