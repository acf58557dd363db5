"""Counts the exponents of gradients, computed in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.demo.model import build_cnn
from kerasmp.demo.results import ExponentHistogram
from kerasmp.policy import policy_scope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kerasmp.demo.model import ImageSpec

# The bins. Values beyond them are rare and count in the outermost bin.
_FIRST, _LAST = -60, 20


class _Tap(keras.layers.Layer):
    """Adds a weight of zeros to its input. The weight then has the gradient of the input."""

    def build(self, input_shape: Any) -> None:
        self.zeros = self.add_weight(shape=tuple(input_shape), initializer="zeros", name="zeros")

    def call(self, inputs: Any) -> Any:
        return inputs + self.zeros


def gradient_exponents(
    spec: ImageSpec,
    weights: Sequence[np.ndarray],
    batch: tuple[np.ndarray, np.ndarray],
    moment: str,
) -> list[ExponentHistogram]:
    """Count the exponents of a batch's gradients, computed in float32 without loss scaling.

    Args:
        spec: Shape, classes and brightness of the images.
        weights: The weights of the model, in the order of `get_weights`.
        batch: Images and labels.
        moment: When the weights were taken: "start" or "end" of training.

    Returns:
        Two histograms: of the gradients with respect to the outputs of the convolutions, which a
        float16 backward pass stores in float16, and with respect to the weights.
    """
    taps: list[_Tap] = []

    def tap() -> _Tap:
        taps.append(_Tap(name=f"tap{len(taps)}"))
        return taps[-1]

    with policy_scope("float32"):
        model = build_cnn(spec, model_class=keras.Model, batch_size=len(batch[0]), tap=tap)
    tapped = {id(layer.zeros) for layer in taps}
    others = [variable for variable in model.weights if id(variable) not in tapped]
    for variable, value in zip(others, weights, strict=True):
        variable.assign(value)
    # After the first step, the momentum of SGD is the negative gradient.
    optimizer = keras.optimizers.SGD(learning_rate=1.0, momentum=0.5)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(*batch)
    gradients: dict[str, list[np.ndarray]] = {"activations": [], "weights": []}
    for variable, gradient in zip(model.trainable_variables, optimizer.momentums, strict=True):
        kind = "activations" if id(variable) in tapped else "weights"
        gradients[kind].append(keras.ops.convert_to_numpy(gradient).ravel())
    return [count_exponents(x, moment, np.concatenate(each)) for x, each in gradients.items()]


def count_exponents(name: str, moment: str, values: np.ndarray) -> ExponentHistogram:
    """Count the values for each binary exponent.

    Args:
        name: What the values are.
        moment: When they were taken.
        values: Floats. inf and NaN are left out.

    Example:

    >>> histogram = count_exponents("weights", "end", np.array([0.0, 1.0, 1.5, 0.25]))
    >>> histogram.zeros, sum(histogram.counts), histogram.counts[0 - histogram.first]
    (1, 3, 2)
    """
    values = np.abs(values[np.isfinite(values)].astype("float64"))
    # frexp returns a fraction in [0.5, 1). Its exponent is one higher than in 1.xxx * 2**e.
    exponents = np.clip(np.frexp(values[values > 0])[1] - 1, _FIRST, _LAST)
    counts = np.bincount(exponents - _FIRST, minlength=_LAST - _FIRST + 1)
    return ExponentHistogram(name, moment, _FIRST, tuple(counts.tolist()), int(np.sum(values == 0)))
