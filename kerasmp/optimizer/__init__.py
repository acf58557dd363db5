"""The wrapped optimizer: the only owner of scaling variables."""

from kerasmp.optimizer.loss_scale_optimizer import LossScaleOptimizer

__all__ = ["LossScaleOptimizer"]
