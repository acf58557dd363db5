"""The wrapped optimizer: the only owner of scaling variables."""

from kerasmp.optimizer.wrapper import LossScaleOptimizer

__all__ = ["LossScaleOptimizer"]
