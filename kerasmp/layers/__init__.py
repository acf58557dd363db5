"""Layers with float32 variables and float16 compute, and float32 where it must be."""

from kerasmp.layers.activations import (
    ELU,
    Activation,
    PReLU,
    Softmax,
)
from kerasmp.layers.attention import (
    AdditiveAttention,
    Attention,
)
from kerasmp.layers.head import (
    DenseHead,
)
from kerasmp.layers.merging import (
    Average,
    Dot,
)
from kerasmp.layers.multi_head_attention import (
    GroupQueryAttention,
    MultiHeadAttention,
)
from kerasmp.layers.normalization import (
    BatchNormalization,
)
from kerasmp.layers.pooling import (
    AveragePooling1D,
    AveragePooling2D,
    AveragePooling3D,
    GlobalAveragePooling1D,
)
from kerasmp.layers.regularization import (
    ActivityRegularization,
)
from kerasmp.layers.scaling import (
    Normalization,
    UnitNormalization,
)
from kerasmp.layers.wrapper import (
    WithDtype,
)

__all__ = [
    "ELU",
    "Activation",
    "ActivityRegularization",
    "AdditiveAttention",
    "Attention",
    "Average",
    "AveragePooling1D",
    "AveragePooling2D",
    "AveragePooling3D",
    "BatchNormalization",
    "DenseHead",
    "Dot",
    "GlobalAveragePooling1D",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "Normalization",
    "PReLU",
    "Softmax",
    "UnitNormalization",
    "WithDtype",
]
