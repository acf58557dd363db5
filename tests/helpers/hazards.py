"""The hazards of half precision in stock Keras: one list for the tests and for the page.

Each entry is measured against float64, tested on every backend, and shown in docs/numerics.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from helpers import best
from helpers import hazard_calls as calls
from helpers import hazard_inputs as inputs
from helpers.float16 import HALVES, rounded

from kerasmp import convert
from kerasmp import layers as safe


@dataclasses.dataclass(frozen=True)
class Hazard:
    """A layer with inputs for which stock Keras is wrong in half precision.

    Args:
        number: The number of the hazard in docs/numerics.md; 0 where stock Keras is right.
        name: The name that readers see.
        layer: Name of the class in keras.layers and kerasmp.layers.
        inputs: Makes arrays from a NumPy generator; those that are not floats have no gradient.
        arguments: For the constructors, or a function that returns them, if they contain layers.
        ours: Name of the class in kerasmp.layers, if it differs.
        rules: Whether the remedy is the stock class under rules="safe".
        call: Runs the layer on the inputs.
        reference_call: Does so in float64, if there is a simpler way with the same result.
        upstream: Standard deviation of the upstream gradients.
        subnormal: Whether to count the smallest numbers too, such as float16's subnormal ones.
        wide: Whether the outputs must be accurate float32 numbers.
        products: Whether the layer multiplies matrices in half precision, or is only the backend's
            softmax of a single weight; `helpers.best` then computes the best.
        ordinary: Standard deviations of further inputs, on which kerasmp must be as accurate.
        halves: The half precisions that it is measured in.
    """

    number: int
    name: str
    layer: str
    inputs: Callable[[np.random.Generator], list[np.ndarray]]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ours: str | None = None
    rules: bool = False
    call: Callable[..., Any] = calls.plain
    reference_call: Callable[..., Any] | None = None
    upstream: float = 1.0
    subnormal: bool = False
    wide: bool = False
    products: bool = False
    ordinary: tuple[float, ...] = (2.0**-5, 1.0, 2.0**5)
    halves: tuple[str, ...] = tuple(HALVES)

    def make(self, contestant, half):
        """Return the layer of a contestant: in float64 for "reference", else in half precision."""
        arguments = dict(self.arguments() if callable(self.arguments) else self.arguments)
        arguments["dtype"] = "float64" if contestant == "reference" else f"mixed_{half}"
        if contestant == "ours" and self.rules:
            return self._converted(getattr(keras.layers, self.layer)(**arguments), half)
        package = {"ours": safe, "best": best}.get(contestant, keras.layers)
        name = self.ours if contestant == "ours" and self.ours else self.layer
        return getattr(package, name)(**arguments)

    def _converted(self, layer, half):
        """Give a layer, within a model, the policy of the rules "safe"."""
        (x,) = self.inputs(np.random.default_rng(0))
        kind = "float32" if x.dtype.kind == "f" else x.dtype.name
        inputs = keras.Input(x.shape[1:], dtype=kind)
        hidden = keras.layers.ReLU()(layer(inputs))
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        convert(model, f"mixed_{half}", rules="safe")
        return layer

    @property
    def answer(self):
        """The remedy, as a user writes it."""
        return f"`{self.ours or self.layer}`" if not self.rules else '`rules="safe"`'

    def hazardous_inputs(self, half):
        """Return the inputs of the hazard in float64, rounded to a half precision."""
        return _held(self.inputs(np.random.default_rng(0)), half)

    def ordinary_inputs(self, half):
        """Yield inputs of the same shapes without the hazard, of several magnitudes."""
        for std in self.ordinary:
            random = np.random.default_rng(2)
            made = self.inputs(random)
            drawn = [
                inputs.normal(x.shape, std=std)(random)[0] if x.dtype.kind == "f" else x
                for x in made
            ]
            yield _held(drawn, half)


def _held(arrays, half):
    return [rounded(x, half) if x.dtype.kind == "f" else x for x in arrays]


def _attention(number, layer, half, std, call, *, mean=0):
    """Return a hazard of an attention layer with projections, in one half precision.

    With a mean above 0 queries and keys are long and similar: their products are large and differ
    little, so that small errors of the scores are small errors of the weights. Inputs with this
    hazard in float16 leave no correct digit in bfloat16, whose rounding is eight times as coarse.
    """
    path = "fused" if call is calls.self_attention else "with scores"
    alike = f", mean {mean}" if mean else ""
    sizes = (2, 512) if mean else (2, 128)
    names = {
        "MultiHeadAttention": ("num_heads", "key_dim"),
        "GroupQueryAttention": ("num_query_heads", "head_dim"),
    }[layer]

    def arguments():
        settings = dict(zip(names, sizes, strict=True))
        if layer == "GroupQueryAttention":
            settings["num_key_value_heads"] = 2 if mean else 1
        if mean:  # the same kernel for queries and keys
            settings["kernel_initializer"] = keras.initializers.GlorotUniform(seed=1)
        return settings

    return Hazard(
        number,
        f"{layer}, {path}, inputs of std {std}{alike}",
        layer,
        inputs.normal((2, 16, 64), std=std, mean=mean),
        arguments,
        call=call,
        reference_call=calls.with_scores,
        upstream=2.0**-4 if mean else 1.0,  # otherwise gradients of kernels are beyond float16
        products=True,
        ordinary=(0.25, 1.0, 4.0) if half == "float16" else (0.25, 1.0),
        halves=(half,),
    )


def _positions(number, layer, shape, **arguments):
    """Return a hazard of a layer whose gradients are sums over many positions."""
    of = " x ".join(str(size) for size in shape[1:-1])
    products = "Dense" in layer or layer.startswith("Separable")
    title = f"{layer}, {of} positions"
    return Hazard(number, title, layer, inputs.normal(shape), arguments, products=products)


def _recurrent(layer):
    return Hazard(
        0,
        f"{layer}, 64 steps",
        layer,
        inputs.normal((8, 64, 16)),
        {"units": 24, "return_sequences": True},
        products=True,
        ordinary=(2.0**-5, 2.0**3),
    )


def _conv_lstm(layer, shape):
    of = " x ".join(str(size) for size in shape[2:-1])
    settings = {"filters": 2, "kernel_size": 3, "padding": "same", "return_sequences": True}
    return Hazard(12, f"{layer}, {of} positions", layer, inputs.normal(shape), settings, rules=True)


def _activation(function, low=-30, high=30, upstream=2.0**12):
    return Hazard(
        11,
        f'Activation("{function}"), from {low} to {high}, upstream gradients of std {upstream:g}',
        "Activation",
        inputs.spread(low, high),
        {"activation": function},
        upstream=upstream,
    )


HAZARDS = [
    Hazard(
        1,
        "Dense(1000, softmax), cross-entropy of probabilities",
        "Dense",
        inputs.beside(inputs.normal((64, 32)), inputs.labels),
        {"units": 1000, "activation": "softmax"},
        ours="DenseHead",
        call=calls.cross_entropy,
        ordinary=(2.0**-5, 1.0),
    ),
    Hazard(
        1,
        "Dense(8, sigmoid), cross-entropy of probabilities",
        "Dense",
        inputs.beside(inputs.normal((64, 32), std=2), inputs.targets),
        {"units": 8, "activation": "sigmoid"},
        ours="DenseHead",
        call=calls.binary_cross_entropy,
        ordinary=(2.0**-5, 1.0),
    ),
    _attention(2, "MultiHeadAttention", "float16", 20, calls.self_attention),
    _attention(2, "MultiHeadAttention", "bfloat16", 7, calls.self_attention),
    *(
        _attention(number, layer, half, 0.5, call, mean=mean)
        for number, call in ((2, calls.self_attention), (3, calls.with_scores))
        for layer in ("MultiHeadAttention", "GroupQueryAttention")
        for half, mean in (("float16", 30), ("bfloat16", 10))
    ),
    Hazard(
        4,
        "Attention to itself, 64 features of std 40",
        "Attention",
        inputs.normal((2, 16, 64), std=40),
        call=calls.to_itself,
        products=True,
        ordinary=(0.25, 1.0),
    ),
    Hazard(
        4,
        "Attention, 64 features of std 5",
        "Attention",
        inputs.normal((2, 16, 64), (2, 16, 64), std=5),
        call=calls.together,
        ordinary=(),
    ),
    Hazard(
        5,
        "Attention, nothing unmasked, negative scores",
        "Attention",
        inputs.beside(inputs.opposite, inputs.no_row),
        call=calls.masked_attention,
        reference_call=calls.nothing_where_all_is_masked,
        ordinary=(0.25, 1.0),
    ),
    Hazard(
        6,
        "Dense(400), activity_regularizer",
        "Dense",
        inputs.normal((200, 16), std=8),
        lambda: {"units": 400, "activity_regularizer": keras.regularizers.L2(1e-3)},
        rules=True,
        call=calls.extra_losses,
        upstream=2.0**5,
        ordinary=(1.0, 2.0**5),  # smaller inputs have a subnormal loss
    ),
    Hazard(
        6,
        "ActivityRegularization",
        "ActivityRegularization",
        inputs.normal((200, 400)),
        {"l1": 1e-3, "l2": 1e-3},
        call=calls.extra_losses,
        upstream=2.0**5,
    ),
    Hazard(
        7,
        "Normalization, a variance of 1e-8",
        "Normalization",
        inputs.normal((64, 8), std=1e-4, mean=0.01),
        {"mean": 0.01, "variance": 1e-8},
        ordinary=(),
    ),
    Hazard(
        7,
        "Normalization, a standard deviation of 1000",
        "Normalization",
        inputs.normal((64, 8), std=1e3, mean=1e3),
        {"mean": 1e3, "variance": 1e6},
        ordinary=(1.0, 100.0),
    ),
    Hazard(
        7,
        "Normalization, a mean of 70000",
        "Normalization",
        inputs.normal((64, 8), std=5e3, mean=4e4),
        {"mean": 7e4, "variance": 1e8},
        ordinary=(1.0, 100.0),
    ),
    Hazard(
        8,
        "UnitNormalization, a norm of 2000",
        "UnitNormalization",
        inputs.normal((8, 400), std=100),
    ),
    Hazard(
        8,
        "Dot(normalize=True), norms of 2000",
        "Dot",
        inputs.normal((8, 400), (8, 400), std=100),
        {"axes": 1, "normalize": True},
        call=calls.together,
    ),
    Hazard(
        9,
        "AveragePooling2D(56)",
        "AveragePooling2D",
        inputs.normal((1, 112, 112, 2), mean=1),
        {"pool_size": 56},
    ),
    Hazard(
        9,
        "AveragePooling1D(2048), a mean of 40",
        "AveragePooling1D",
        inputs.normal((2, 4096, 2), mean=40),
        {"pool_size": 2048},
    ),
    Hazard(
        10,
        "GlobalAveragePooling1D with a mask, 2000 steps, a mean of 100",
        "GlobalAveragePooling1D",
        inputs.beside(inputs.normal((4, 2000, 3), mean=100), inputs.half_masked),
        call=calls.masked,
        reference_call=calls.mean_of_unmasked,
    ),
    *map(_activation, ("gelu", "silu", "mish")),
    _activation("hard_silu", -3, 1, upstream=2.0**13),
    _activation("squareplus", -300, 300),
    _positions(12, "Dense", (2, 10000, 4), units=4),
    _positions(
        12,
        "EinsumDense",
        (2, 6272, 3),
        equation="abc,cd->abd",
        output_shape=(6272, 4),
        bias_axes="d",
    ),
    _positions(12, "Conv1D", (2, 6272, 3), filters=4, kernel_size=3),
    _positions(12, "Conv2D", (2, 112, 112, 1), filters=2, kernel_size=3),
    _positions(12, "Conv3D", (1, 24, 24, 24, 2), filters=2, kernel_size=3),
    _positions(12, "Conv1DTranspose", (2, 6272, 3), filters=4, kernel_size=3),
    _positions(12, "Conv2DTranspose", (1, 112, 112, 3), filters=4, kernel_size=3),
    _positions(12, "Conv3DTranspose", (1, 24, 24, 24, 2), filters=2, kernel_size=3),
    _positions(12, "DepthwiseConv1D", (2, 6272, 3), kernel_size=3),
    _positions(12, "DepthwiseConv2D", (1, 112, 112, 3), kernel_size=3),
    _positions(12, "SeparableConv1D", (2, 6272, 3), filters=4, kernel_size=3),
    _positions(12, "SeparableConv2D", (1, 112, 112, 3), filters=4, kernel_size=3),
    Hazard(
        13,
        "SpectralNormalization, the kernel after a training step",
        "SpectralNormalization",
        inputs.normal((8, 16)),
        lambda: {"layer": keras.layers.Dense(32, name="dense")},
        call=calls.kernel_after_training,
        wide=True,
    ),
    Hazard(14, "Softmax(axis=(1, 2))", "Softmax", inputs.normal((4, 8, 8, 2)), {"axis": (1, 2)}),
    Hazard(
        15,
        'Activation("sigmoid"), tails',
        "Activation",
        inputs.spread(4, 9),
        {"activation": "sigmoid"},
    ),
    Hazard(
        15, 'Activation("tanh"), tails', "Activation", inputs.spread(2, 4.5), {"activation": "tanh"}
    ),
    Hazard(15, "Softmax, tails", "Softmax", inputs.normal((64, 10), std=4)),
    Hazard(
        16,
        "Average of three inputs of 30000",
        "Average",
        inputs.normal((8, 16), (8, 16), (8, 16), mean=30000, std=100),
        call=calls.together,
    ),
    Hazard(
        17,
        "AdditiveAttention, its scale",
        "AdditiveAttention",
        inputs.normal((4, 32, 64), (4, 32, 64)),
        call=calls.together,
    ),
    Hazard(
        17,
        "Attention(use_scale=True), its scale",
        "Attention",
        inputs.normal((4, 32, 64), (4, 32, 64)),
        {"use_scale": True},
        call=calls.together,
        ordinary=(0.25, 1.0),
    ),
    Hazard(
        18,
        "Softmax over 100,000 classes",
        "Softmax",
        inputs.normal((2, 100_000)),
        rules=True,
        subnormal=True,
    ),
    Hazard(
        19,
        "Softmax with a mask, logits of -40000",
        "Softmax",
        inputs.beside(lambda _: [np.full((2, 16), -4e4)], inputs.some),
        call=calls.masked,
        ordinary=(2.0**-5, 1.0),  # with larger inputs one dominates and all gradients are subnormal
    ),
    Hazard(
        8,
        "UnitNormalization, a row of zeros",
        "UnitNormalization",
        inputs.with_a_row_of_zeros((6, 300)),
        reference_call=calls.unit_or_zeros,
    ),
    Hazard(
        9,
        "AveragePooling3D(20), a mean of 10",
        "AveragePooling3D",
        inputs.normal((1, 20, 20, 20, 2), mean=10),
        {"pool_size": 20},
        reference_call=calls.mean_of_everything,  # TensorFlow pools no float64 in three dimensions
    ),
    Hazard(
        11,
        "PReLU, its slope for 112 x 112 positions",
        "PReLU",
        inputs.normal((2, 112, 112, 1)),
        lambda: {"shared_axes": [1, 2], "alpha_initializer": keras.initializers.Constant(0.25)},
    ),
    Hazard(
        12,
        "SimpleRNN, 2048 rows",
        "SimpleRNN",
        inputs.normal((2048, 2, 4)),
        {"units": 4, "return_sequences": True},
        rules=True,
        reference_call=calls.steps,
    ),
    _conv_lstm("ConvLSTM1D", (2, 2, 2048, 2)),
    _conv_lstm("ConvLSTM2D", (2, 2, 32, 32, 2)),
    _conv_lstm("ConvLSTM3D", (2, 2, 12, 12, 12, 1)),
    Hazard(
        21,
        "Embedding, an id that a batch has 4096 times",
        "Embedding",
        inputs.often,
        {"input_dim": 3, "output_dim": 4},
        ordinary=(),
    ),
    Hazard(
        21,
        "ReversibleEmbedding, an id that a batch has 4096 times",
        "ReversibleEmbedding",
        inputs.often,
        {"input_dim": 3, "output_dim": 4},
        rules=True,
        ordinary=(),
    ),
    Hazard(11, "ELU, near 0", "ELU", inputs.normal((4000,), std=0.05)),
    # Layers whose stock versions are accurate; kerasmp.layers must be as accurate.
    Hazard(
        0,
        "BatchNormalization, training",
        "BatchNormalization",
        inputs.normal((64, 8, 8, 4)),
        call=calls.training,
    ),
    *map(_recurrent, ("LSTM", "GRU")),
]
BY_NAME = {hazard.name: hazard for hazard in HAZARDS}
# The hazards measured in each half precision.
MEASURED = [(hazard.name, half) for half in HALVES for hazard in HAZARDS if half in hazard.halves]
