"""Exponents and what float16 makes of them, compared with NumPy's float16."""

import keras
import numpy as np
import pytest

from kerasmp.demo import ExponentHistogram
from kerasmp.demo.exponents import build_cnn, count_exponents, gradient_exponents


def numpy_fate(values, scale):
    """The effect of a NumPy cast on each value."""
    with np.errstate(over="ignore"):
        cast = np.abs((values * scale).astype("float16"))
    smallest_normal = np.finfo("float16").smallest_normal
    return (
        np.mean(cast == 0),
        np.mean((cast > 0) & (cast < smallest_normal)),
        np.mean((cast >= smallest_normal) & np.isfinite(cast)),
        np.mean(np.isinf(cast)),
    )


@pytest.mark.unit
@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**15, 2.0**24, 2.0**-8])
def test_fate_agrees_with_a_cast_by_numpy(scale):
    generator = np.random.default_rng(0)
    # Away from the ends of each binade, where rounding may reach the next one.
    fractions = generator.uniform(1.01, 1.99, 4000)
    values = fractions * 2.0 ** generator.integers(-50, 18, 4000) * generator.choice([-1, 1], 4000)
    fate = count_exponents("weights", "end", values).fate(scale)
    found = (fate.lost, fate.subnormal, fate.kept, fate.overflow)
    assert found == pytest.approx(numpy_fate(values, scale), abs=1e-12)


@pytest.mark.unit
def test_bins_hold_their_powers_of_two():
    values = np.array([1.0, 1.999, 2.0, -0.5, 0.0, np.inf, np.nan], "float32")
    histogram = count_exponents("weights", "start", values)
    found = {
        histogram.first + place: count for place, count in enumerate(histogram.counts) if count
    }
    assert found == {0: 2, 1: 1, -1: 1}
    assert histogram.zeros == 1


@pytest.mark.unit
def test_values_beyond_the_bins_are_counted_in_the_outermost():
    histogram = count_exponents("weights", "start", np.array([1e-40, 1e30]))
    assert (histogram.counts[0], histogram.counts[-1]) == (1, 1)


@pytest.mark.unit
def test_no_values_have_no_fate():
    fate = ExponentHistogram("weights", "end", -3, (0, 0), 4).fate()
    assert (fate.lost, fate.subnormal, fate.kept, fate.overflow) == (0, 0, 0, 0)


def test_gradients_are_those_of_the_loss(images):
    spec = images.spec
    model = build_cnn(spec, model_class=keras.Model)
    batch = (images.train[0][:8].astype("float32"), images.train[1][:8])
    activations, weights = gradient_exponents(spec, model.get_weights(), batch, "start")
    assert (activations.name, weights.name) == ("activations", "weights")
    assert sum(activations.counts) + activations.zeros == 8 * (8 * 8 * 16 + 4 * 4 * 32)
    assert sum(weights.counts) + weights.zeros == sum(
        int(np.prod(variable.shape)) for variable in model.trainable_variables
    )
    # One step of plain gradient descent shows the same gradients, up to rounding.
    before = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    model.compile(
        keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.train_on_batch(*batch)
    after = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    steps = np.concatenate([(b - a).ravel() for b, a in zip(before, after, strict=True)])
    expected = count_exponents("weights", "start", steps)
    big = slice(-8 - expected.first, None)  # smaller ones are rounded by the subtraction
    difference = np.abs(np.subtract(expected.counts[big], weights.counts[big]))
    assert sum(weights.counts[big]) > 50
    assert difference.sum() <= 4
