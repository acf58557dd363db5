"""A place where half precision may go wrong: a layer, inputs, and what to compare it with."""

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
    """A layer, and inputs that stock Keras gets wrong in half precision.

    Args:
        number: The hazard it belongs to, as docs/numerics.md counts them; 0 where stock is right.
        name: What a reader shall see.
        layer: Name of the class, in keras.layers and in kerasmp.layers.
        inputs: Makes arrays of floats, or others that have no gradient, from a NumPy generator.
        arguments: For the constructors. Called, if it holds layers.
        ours: Name of the class in kerasmp.layers, if it is another.
        rules: Whether the stock class under rules="safe" is the answer.
        call: Runs the layer on the inputs.
        reference_call: Does so in float64, if there is a simpler way with the same result.
        upstream: Standard deviation of the gradients that come from above.
        subnormal: Whether the smallest numbers count, too, such as float16's subnormal ones.
        wide: Whether the outputs have to be good float32 numbers.
        products: Whether it multiplies matrices in half precision, or is nothing but the backend's
            softmax of one weight; `helpers.best` then has its best.
        ordinary: Standard deviations of further inputs, on which ours must be as good.
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
        """Return the layer of "reference" (float64), or in half precision of the others."""
        arguments = dict(self.arguments() if callable(self.arguments) else self.arguments)
        arguments["dtype"] = "float64" if contestant == "reference" else f"mixed_{half}"
        if contestant == "ours" and self.rules:
            return self._converted(getattr(keras.layers, self.layer)(**arguments), half)
        package = {"ours": safe, "best": best}.get(contestant, keras.layers)
        name = self.ours if contestant == "ours" and self.ours else self.layer
        return getattr(package, name)(**arguments)

    def _converted(self, layer, half):
        """Give a layer, within a model, the policy that the rules "safe" find for it."""
        (x,) = self.inputs(np.random.default_rng(0))
        kind = "float32" if x.dtype.kind == "f" else x.dtype.name
        inputs = keras.Input(x.shape[1:], dtype=kind)
        hidden = keras.layers.ReLU()(layer(inputs))
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        convert(model, f"mixed_{half}", rules="safe")
        return layer

    @property
    def answer(self):
        """What a user writes."""
        return f"`{self.ours or self.layer}`" if not self.rules else '`rules="safe"`'

    def hazardous_inputs(self, half):
        """Return the inputs of the hazard, in float64, as numbers that a half precision holds."""
        return _held(self.inputs(np.random.default_rng(0)), half)

    def ordinary_inputs(self, half):
        """Yield such inputs of the same shapes without the hazard, of several magnitudes."""
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
