"""One small case for each layer class that computes with floats: arguments and inputs.

A case is for keras.layers and, if it has a class of the same name, for kerasmp.layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import kerasmp.layers

# Classes without anything to compare in float16, with the reason.
WITHOUT = {
    "Layer": "the base class",
    "Wrapper": "a base class",
    "InputLayer": "computes nothing",
    "CategoryEncoding": "takes ids",
    "Discretization": "gives ids",
    "HashedCrossing": "gives ids",
    "Hashing": "gives ids",
    "IntegerLookup": "gives ids",
    "StringLookup": "gives ids",
    "TextVectorization": "gives ids",
    "MaxNumBoundingBoxes": "selects boxes",
    "Pipeline": "holds layers that prepare images",
    "FlaxLayer": "code of another framework",
    "JaxLayer": "code of another framework",
    "TFSMLayer": "code of another framework",
    "TorchModuleWrapper": "code of another framework",
    "LSTMCell": "within LSTM and RNN",
    "GRUCell": "within GRU",
    "SimpleRNNCell": "within SimpleRNN",
    "StackedRNNCells": "within RNN",
}
# Layers that augment images: they prepare data, and no gradient goes through them.
AUGMENTATION = "BaseImagePreprocessingLayer"


@dataclasses.dataclass(frozen=True)
class Case:
    """Constructor arguments and inputs of a layer.

    Args:
        shapes: The shapes of the inputs.
        arguments: Returns the arguments of the constructor.
        together: Whether several inputs are passed as one list.
        ids: The largest id, if the inputs are ids.
        free: Axes of the inputs whose size may be unknown.
        tolerance: Relative error that float16 may have, larger for layers of many operations.
    """

    shapes: tuple[tuple[int, ...], ...]
    arguments: Callable[[], dict[str, Any]]
    together: bool = False
    ids: int = 0
    free: tuple[int, ...] = (0,)
    tolerance: float = 2.0**-8

    def make(self, cls, dtype):
        return cls(**self.arguments(), dtype=dtype)

    def call(self, layer, *inputs, **arguments):
        return layer(list(inputs), **arguments) if self.together else layer(*inputs, **arguments)

    def inputs(self, seed=0):
        return self.of_shapes(self.shapes, seed)

    def larger(self):
        """Return inputs with longer free axes."""
        shapes = [[n + 3 * (i in self.free) for i, n in enumerate(s)] for s in self.shapes]
        return self.of_shapes(shapes)

    def of_shapes(self, shapes, seed=0):
        random = np.random.default_rng(seed)
        if self.ids:
            return [random.integers(1, self.ids, shape).astype("int32") for shape in shapes]
        return [random.normal(size=s).astype("float16").astype("float32") for s in shapes]


def case(*shapes, together=False, ids=0, free=(0,), tolerance=2.0**-8, make=None, **arguments):
    """Return a case; `make` returns arguments that are layers, new ones for each call."""
    return Case(
        shapes,
        lambda: arguments | (make() if make else {}),
        together=together,
        ids=ids,
        free=free,
        tolerance=tolerance,
    )


FLAT, STEPS, IMAGE, VOLUME = (4, 6), (2, 5, 6), (2, 8, 8, 3), (2, 4, 4, 4, 2)
BY_RANK = {1: (2, 8, 3), 2: IMAGE, 3: VOLUME}

# The default initializer, Orthogonal, takes seconds to compile on JAX.
RECURRENT = {"recurrent_initializer": "glorot_uniform", "tolerance": 2**-7}


def _by_rank(name, **arguments):
    return {
        name.format(n): case(shape, free=(0, *range(1, n + 1)), **arguments)
        for n, shape in BY_RANK.items()
    }


def _merging(name, **arguments):
    return {name: case(FLAT, FLAT, together=True, **arguments)}


def _dense():
    return {"layer": keras.layers.Dense(3)}


CASES = {
    "Activation": case(FLAT, activation="gelu"),
    "ActivityRegularization": case(FLAT, l2=0.1),
    **_by_rank("AdaptiveAveragePooling{}D", output_size=2),
    **_by_rank("AdaptiveMaxPooling{}D", output_size=2),
    **_merging("Add"),
    "AdditiveAttention": case(STEPS, STEPS, together=True, free=(0, 1)),
    "AlphaDropout": case(FLAT, rate=0.5, seed=1),
    "Attention": case(STEPS, STEPS, together=True, free=(0, 1), use_scale=True),
    **_merging("Average"),
    **_by_rank("AveragePooling{}D", pool_size=2),
    "BatchNormalization": case(IMAGE, free=(0, 1, 2)),
    "Bidirectional": case(
        STEPS, free=(0, 1), tolerance=2**-7, make=lambda: {"layer": keras.layers.GRU(3)}
    ),
    "CenterCrop": case(IMAGE, height=4, width=4),
    **_merging("Concatenate"),
    **_by_rank("Conv{}D", filters=4, kernel_size=3, padding="same"),
    **_by_rank("Conv{}DTranspose", filters=4, kernel_size=3, padding="same"),
    "ConvLSTM1D": case((2, 3, 8, 2), filters=2, kernel_size=3, **RECURRENT),
    "ConvLSTM2D": case((2, 3, 6, 6, 2), filters=2, kernel_size=3, **RECURRENT),
    "ConvLSTM3D": case((1, 2, 4, 4, 4, 1), filters=1, kernel_size=3, **RECURRENT),
    "Cropping1D": case(BY_RANK[1]),
    "Cropping2D": case(IMAGE),
    "Cropping3D": case(VOLUME),
    "Dense": case(FLAT, units=3),
    "DenseHead": case(FLAT, units=3, activation="softmax"),
    "DepthwiseConv1D": case(BY_RANK[1], kernel_size=3, free=(0, 1)),
    "DepthwiseConv2D": case(IMAGE, kernel_size=3, free=(0, 1, 2)),
    "Dot": case(FLAT, FLAT, together=True, axes=1, normalize=True),
    "Dropout": case(FLAT, rate=0.5, seed=1),
    "ELU": case(FLAT),
    "EinsumDense": case(STEPS, equation="abc,cd->abd", output_shape=(5, 4), bias_axes="d"),
    "Embedding": case((4, 5), ids=7, input_dim=8, output_dim=3, free=(0, 1)),
    "Flatten": case(STEPS),
    "GRU": case(STEPS, units=3, free=(0, 1), **RECURRENT),
    "GaussianDropout": case(FLAT, rate=0.5, seed=1),
    "GaussianNoise": case(FLAT, stddev=0.5, seed=1),
    **_by_rank("GlobalAveragePooling{}D"),
    **_by_rank("GlobalMaxPooling{}D"),
    "GroupNormalization": case(IMAGE, groups=3, free=(0, 1, 2)),
    **dict.fromkeys(
        ("GroupQueryAttention", "GroupedQueryAttention"),  # as exported, and as Keras calls it
        case(
            STEPS,
            STEPS,
            head_dim=4,
            num_query_heads=2,
            num_key_value_heads=1,
            free=(0, 1),
            tolerance=2**-7,
        ),
    ),
    "Identity": case(FLAT),
    "LSTM": case(STEPS, units=3, free=(0, 1), **RECURRENT),
    "Lambda": case(FLAT, function=keras.ops.tanh),
    "LayerNormalization": case(STEPS, free=(0, 1)),
    "LeakyReLU": case(FLAT),
    "Masking": case(STEPS, free=(0, 1)),
    **_by_rank("MaxPooling{}D", pool_size=2),
    **_merging("Maximum"),
    "MelSpectrogram": case(
        (2, 64), fft_length=16, num_mel_bins=4, sampling_rate=64, min_freq=1, max_freq=32
    ),
    **_merging("Minimum"),
    "MultiHeadAttention": case(STEPS, STEPS, num_heads=2, key_dim=4, free=(0, 1), tolerance=2**-7),
    **_merging("Multiply"),
    "Normalization": case(FLAT, mean=0.5, variance=4.0),
    "PReLU": case(FLAT, alpha_initializer="ones"),
    "Permute": case(STEPS, dims=(2, 1)),
    "RMSNormalization": case(STEPS, free=(0, 1)),
    "RNN": case(
        STEPS,
        tolerance=2**-7,
        make=lambda: {"cell": [keras.layers.LSTMCell(3), keras.layers.GRUCell(2)]},
    ),
    "ReLU": case(FLAT),
    "RepeatVector": case(FLAT, n=3),
    "Rescaling": case(IMAGE, scale=1 / 3, offset=0.5, free=(0, 1, 2)),
    "Reshape": case(STEPS, target_shape=(6, 5)),
    "Resizing": case(IMAGE, height=4, width=6),
    "ReversibleEmbedding": case((4, 5), ids=7, input_dim=8, output_dim=3),
    "STFTSpectrogram": case((2, 64, 1), frame_length=16, frame_step=8, fft_length=16),
    "SeparableConv1D": case(BY_RANK[1], filters=4, kernel_size=3, free=(0, 1)),
    "SeparableConv2D": case(IMAGE, filters=4, kernel_size=3, free=(0, 1, 2)),
    "SimpleRNN": case(STEPS, units=3, free=(0, 1), **RECURRENT),
    "Softmax": case(FLAT),
    **_by_rank("SpatialDropout{}D", rate=0.5, seed=1),
    "SpectralNormalization": case(FLAT, make=_dense),
    **_merging("Subtract"),
    "TimeDistributed": case(STEPS, make=_dense),
    "UnitNormalization": case(FLAT),
    **_by_rank("UpSampling{}D", size=2),
    "WithDtype": case(FLAT, make=_dense),
    **_by_rank("ZeroPadding{}D"),
}


def classes(module):
    """Return all layer classes of a module by name, without second names."""
    return {
        cls.__name__: cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, keras.Layer)
    }


def computing(module):
    """Return the classes that have, or ought to have, a case."""
    return {
        name: cls
        for name, cls in classes(module).items()
        if name not in WITHOUT
        and (name in CASES or AUGMENTATION not in {base.__name__ for base in cls.__mro__})
    }


STOCK, OURS = computing(keras.layers), computing(kerasmp.layers)
