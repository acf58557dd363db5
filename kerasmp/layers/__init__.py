"""Layers with float32 variables and float16 compute, and float32 where it must be."""

from kerasmp.layers.attention import AdditiveAttention, Attention
from kerasmp.layers.head import DenseHead
from kerasmp.layers.multi_head_attention import GroupQueryAttention, MultiHeadAttention
from kerasmp.layers.normalization import BatchNormalization
from kerasmp.layers.wrapper import WithDtype

__all__ = [
    "AdditiveAttention",
    "Attention",
    "BatchNormalization",
    "DenseHead",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "WithDtype",
]
