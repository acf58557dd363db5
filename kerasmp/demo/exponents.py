"""Exponents of gradients, taken in float32 and in Keras alone, so that any backend can do it."""

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

_FIRST, _LAST = -60, 20  # bins; the rare value beyond is counted in the outermost


class _Tap(keras.layers.Layer):
    """Adds a weight of zeros to its input: its gradient is that of the activation."""

    def build(self, input_shape: Any) -> None:
        self.added = self.add_weight(shape=tuple(input_shape), initializer="zeros", name="added")

    def call(self, inputs: Any) -> Any:
        return inputs + self.added


class _Recorder(keras.optimizers.Optimizer):
    """Keeps each gradient in a variable and changes no weight."""

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self.kept = [
            self.add_variable_from_reference(variable, name="kept") for variable in variables
        ]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:  # noqa: ARG002 - Keras's
        self.assign(self.kept[self._get_variable_index(variable)], gradient)


def gradient_exponents(
    spec: ImageSpec,
    weights: Sequence[np.ndarray],
    batch: tuple[np.ndarray, np.ndarray],
    moment: str,
) -> tuple[ExponentHistogram, ExponentHistogram]:
    """Return the exponents of a batch's gradients, computed in float32 without any scale.

    Args:
        spec: What the images are like.
        weights: The model's weights, in the order of `get_weights`.
        batch: Images and labels.
        moment: When the weights were taken; kept in the result.

    Returns:
        For the gradients with respect to the outputs of the convolutions, which a backward pass in
        float16 holds in float16, and for those with respect to the weights.
    """
    taps: list[Any] = []

    def tap(name: str) -> Any:
        taps.append(_Tap(name=f"{name}_tap"))
        return taps[-1]

    with policy_scope("float32"):
        model = build_cnn(spec, model_class=keras.Model, batch_size=len(batch[0]), tap=tap)
    _set_weights(model, weights, taps)
    recorder = _Recorder(learning_rate=1.0, name="recorder")
    model.compile(recorder, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(*batch)
    tapped = {id(layer.added) for layer in taps}
    found: dict[str, list[np.ndarray]] = {"activations": [], "weights": []}
    for variable, kept in zip(model.trainable_variables, recorder.kept, strict=True):
        kind = "activations" if id(variable) in tapped else "weights"
        found[kind].append(keras.ops.convert_to_numpy(kept).ravel())
    return (
        count_exponents("activations", moment, np.concatenate(found["activations"])),
        count_exponents("weights", moment, np.concatenate(found["weights"])),
    )


def _set_weights(model: Any, weights: Sequence[np.ndarray], taps: Sequence[Any]) -> None:
    tapped = {id(layer.added) for layer in taps}
    own = [variable for variable in model.weights if id(variable) not in tapped]
    for variable, value in zip(own, weights, strict=True):
        variable.assign(value)


def count_exponents(name: str, moment: str, values: np.ndarray) -> ExponentHistogram:
    """Return how many values have which exponent.

    Args:
        name: What the values are.
        moment: When they were taken.
        values: Floats; infinities and NaN are left out.

    Example:

    >>> histogram = count_exponents("weights", "end", np.array([0.0, 1.0, 1.5, 0.25]))
    >>> histogram.zeros, sum(histogram.counts), histogram.counts[0 - histogram.first]
    (1, 3, 2)
    """
    values = np.abs(values[np.isfinite(values)].astype("float64"))
    nonzero = values[values > 0]
    # frexp gives a fraction in [0.5, 1), so its exponent is one more than that of 1.xxx * 2**e.
    exponents = np.clip(np.frexp(nonzero)[1] - 1, _FIRST, _LAST)
    counts = np.bincount(exponents - _FIRST, minlength=_LAST - _FIRST + 1)
    return ExponentHistogram(
        name, moment, _FIRST, tuple(int(count) for count in counts), int(np.sum(values == 0))
    )
