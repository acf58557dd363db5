"""Layers with float32 variables and float16 compute, and float32 where it must be."""

from kerasmp.layers.head import DenseHead
from kerasmp.layers.normalization import BatchNormalization
from kerasmp.layers.wrapper import WithDtype

__all__ = ["BatchNormalization", "DenseHead", "WithDtype"]
