"""Drop-in replacements for Keras layers, with float32 variables and float32 where it matters."""

from kerasmp.layers.attention import (
    AdditiveAttention,
    Attention,
    GroupQueryAttention,
    MultiHeadAttention,
)
from kerasmp.layers.embedding import Embedding
from kerasmp.layers.head import DenseHead
from kerasmp.layers.in_float32 import (
    ELU,
    Activation,
    ActivityRegularization,
    Average,
    AveragePooling1D,
    AveragePooling2D,
    AveragePooling3D,
    Dot,
    GlobalAveragePooling1D,
    PReLU,
    Softmax,
    UnitNormalization,
)
from kerasmp.layers.masking import Masking
from kerasmp.layers.noise import (
    Dropout,
    GaussianDropout,
    GaussianNoise,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
)
from kerasmp.layers.normalization import BatchNormalization, Normalization, SpectralNormalization
from kerasmp.layers.products import (
    Conv1D,
    Conv1DTranspose,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    Conv3DTranspose,
    Dense,
    DepthwiseConv1D,
    DepthwiseConv2D,
    EinsumDense,
    SeparableConv1D,
    SeparableConv2D,
)
from kerasmp.layers.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell
from kerasmp.layers.wrapper import WithDtype

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
