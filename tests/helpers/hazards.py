"""Where float16 goes wrong in stock Keras: one list, for the tests and for the page of numbers.

A new entry is measured against float64, tested on every backend, and shown in docs/numerics.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from helpers import best
from helpers import hazard_calls as calls
from helpers import hazard_inputs as inputs

from kerasmp import layers as safe


@dataclasses.dataclass(frozen=True)
class Hazard:
    """A layer, and inputs that stock Keras gets wrong in float16.

    Args:
        number: The hazard it belongs to, as docs/numerics.md counts them.
        name: What a reader shall see.
        layer: Name of the class, in keras.layers and in kerasmp.layers.
        inputs: Makes float16 arrays, or others that have no gradient, from a NumPy generator.
        arguments: For the constructors. Called, if it holds layers.
        ours: Name of the class in kerasmp.layers, if it is another.
        remedy: Arguments that rules="safe" gives the stock class, if they are the answer.
        call: Runs the layer on the inputs.
        reference_call: Does so in float64, if there is a simpler way with the same result.
        upstream: Standard deviation of the gradients that come from above.
        subnormal: Whether numbers below float16's normal ones count.
        wide: Whether the outputs have to be good float32 numbers.
        products: Whether it multiplies matrices in float16; `helpers.best` then has its best.
        ordinary: Standard deviations of further inputs, on which ours must be as good.
    """

    number: int
    name: str
    layer: str
    inputs: Callable[[np.random.Generator], list[np.ndarray]]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ours: str | None = None
    remedy: Mapping[str, Any] | None = None
    call: Callable[..., Any] = calls.plain
    reference_call: Callable[..., Any] | None = None
    upstream: float = 1.0
    subnormal: bool = False
    wide: bool = False
    products: bool = False
    ordinary: tuple[float, ...] = (2.0**-5, 1.0, 2.0**5)

    def make(self, contestant):
        """Return the layer of "reference" (float64), "stock", "ours" or "best"."""
        arguments = dict(self.arguments() if callable(self.arguments) else self.arguments)
        arguments["dtype"] = "float64" if contestant == "reference" else "mixed_float16"
        if contestant == "ours" and self.remedy is not None:
            return getattr(keras.layers, self.layer)(**arguments | self.remedy)
        room = {"ours": safe, "best": best}.get(contestant, keras.layers)
        name = self.ours if contestant == "ours" and self.ours else self.layer
        return getattr(room, name)(**arguments)

    @property
    def answer(self):
        """What a user writes."""
        return f"`{self.ours or self.layer}`" if self.remedy is None else '`rules="safe"`'

    def ordinary_inputs(self):
        """Yield inputs of the same shapes without the hazard, of several magnitudes."""
        for std in self.ordinary:
            random = np.random.default_rng(2)
            made = self.inputs(random)
            yield [
                inputs.normal(x.shape, std=std)(random)[0] if x.dtype.kind == "f" else x
                for x in made
            ]


def _attention(number, layer, std, call):
    """Return a hazard of an attention layer with projections."""
    arguments = {
        "MultiHeadAttention": {"num_heads": 2, "key_dim": 128},
        "GroupQueryAttention": {"head_dim": 128, "num_query_heads": 2, "num_key_value_heads": 1},
    }[layer]
    path = "fused" if call is calls.self_attention else "with scores"
    return Hazard(
        number,
        f"{layer}, {path}, inputs of std {std}",
        layer,
        inputs.normal((4, 32, 64), std=std),
        arguments,
        call=call,
        reference_call=calls.with_scores,
        upstream=min(1.0, 2 / std),  # else the gradients of kernels are beyond float16
        products=True,
        ordinary=(0.25, 1.0, 4.0),
    )


def _activation(function):
    return Hazard(
        11,
        f'Activation("{function}"), large upstream gradients',
        "Activation",
        inputs.spread(-30, 30),
        {"activation": function},
        upstream=2.0**12,
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
    _attention(2, "MultiHeadAttention", 20, calls.self_attention),
    _attention(2, "MultiHeadAttention", 60, calls.self_attention),
    _attention(2, "GroupQueryAttention", 60, calls.self_attention),
    _attention(3, "MultiHeadAttention", 100, calls.with_scores),
    _attention(3, "GroupQueryAttention", 30, calls.with_scores),
    Hazard(
        4,
        "Attention, 64 features of std 30",
        "Attention",
        inputs.normal((2, 16, 64), (2, 16, 64), std=30),
        call=calls.together,
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
        inputs.beside(
            lambda random: [
                *inputs.normal((2, 16, 64), mean=4)(random),
                *inputs.normal((2, 16, 64), mean=-4)(random),
            ],
            inputs.no_row,
        ),
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
        remedy={"dtype": "float32"},
        call=calls.extra_losses,
        upstream=2.0**5,
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
    *map(_activation, ("gelu", "silu", "mish", "hard_silu", "squareplus")),
    Hazard(
        12,
        "Conv2D, maps of 112 x 112, the bias",
        "Conv2D",
        inputs.normal((2, 112, 112, 1)),
        {"filters": 2, "kernel_size": 3, "padding": "same"},
    ),
    Hazard(
        12,
        "Dense on 20000 positions, the bias",
        "Dense",
        inputs.normal((2, 10000, 4)),
        {"units": 4},
    ),
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
        remedy={"dtype": "float32"},
        subnormal=True,
    ),
    Hazard(
        19,
        "Softmax with a mask, logits of -40000",
        "Softmax",
        inputs.beside(lambda _: [np.full((2, 16), -4e4, "float16")], inputs.some),
        call=calls.masked,
    ),
]
