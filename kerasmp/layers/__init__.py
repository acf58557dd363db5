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
from kerasmp.layers.convolutional import (
    Conv1D,
    Conv1DTranspose,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    Conv3DTranspose,
    DepthwiseConv1D,
    DepthwiseConv2D,
    SeparableConv1D,
    SeparableConv2D,
)
from kerasmp.layers.dense import (
    Dense,
    EinsumDense,
)
from kerasmp.layers.embedding import (
    Embedding,
)
from kerasmp.layers.head import (
    DenseHead,
)
from kerasmp.layers.masking import (
    Masking,
)
from kerasmp.layers.merging import (
    Average,
    Dot,
)
from kerasmp.layers.multi_head_attention import (
    GroupQueryAttention,
    MultiHeadAttention,
)
from kerasmp.layers.noise import (
    Dropout,
    GaussianDropout,
    GaussianNoise,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
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
from kerasmp.layers.recurrent import (
    GRU,
    LSTM,
    RNN,
)
from kerasmp.layers.recurrent_cells import (
    GRUCell,
    LSTMCell,
)
from kerasmp.layers.regularization import (
    ActivityRegularization,
)
from kerasmp.layers.scaling import (
    Normalization,
    UnitNormalization,
)
from kerasmp.layers.spectral import (
    SpectralNormalization,
)
from kerasmp.layers.wrapper import (
    WithDtype,
)

__all__ = [
    "ELU",
    "GRU",
    "LSTM",
    "RNN",
    "Activation",
    "ActivityRegularization",
    "AdditiveAttention",
    "Attention",
    "Average",
    "AveragePooling1D",
    "AveragePooling2D",
    "AveragePooling3D",
    "BatchNormalization",
    "Conv1D",
    "Conv1DTranspose",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
    "Dense",
    "DenseHead",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "Dot",
    "Dropout",
    "EinsumDense",
    "Embedding",
    "GRUCell",
    "GaussianDropout",
    "GaussianNoise",
    "GlobalAveragePooling1D",
    "GroupQueryAttention",
    "LSTMCell",
    "Masking",
    "MultiHeadAttention",
    "Normalization",
    "PReLU",
    "SeparableConv1D",
    "SeparableConv2D",
    "Softmax",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "SpectralNormalization",
    "UnitNormalization",
    "WithDtype",
]
