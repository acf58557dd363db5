"""Layers that draw random numbers: the dropped share equals the rate, and noise is normal."""

import math

import keras
import numpy as np
import pytest
from helpers.gradients import numpy
from helpers.marks import full_on
from keras import ops

from kerasmp import layers

ROWS = COLUMNS = 1000
HALVES = ["float16", "bfloat16"]


def drawn(layer, half, shape=(ROWS, COLUMNS), value=1.0):
    outputs = layer(ops.full(shape, value), training=True)
    assert keras.backend.standardize_dtype(outputs.dtype) == half
    return numpy(outputs)


def assert_share(zeros, rate):
    """Assert a share of zeros within five standard deviations of the expected one."""
    assert abs(np.mean(zeros) - rate) < 5 * math.sqrt(rate * (1 - rate) / zeros.size)


@full_on("jax")  # which drops in float32 in any dtype
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.999])
def test_dropout_drops_the_share_that_its_rate_says(rate, half):
    y = drawn(layers.Dropout(rate, seed=1, dtype=f"mixed_{half}"), half)
    assert_share(y == 0, rate)
    assert np.allclose(y[y != 0], 1 / (1 - rate), rtol=2**-8, atol=0)


@full_on("jax")  # which drops in float32 in any dtype
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_spatial_dropout_drops_the_share_of_maps_that_its_rate_says(axes, half):
    cls = getattr(layers, f"SpatialDropout{axes}D")
    layer = cls(0.001, seed=1, dtype=f"mixed_{half}")
    y = drawn(layer, half, (ROWS, 2, *[1] * (axes - 1), COLUMNS // 2))
    y = y.reshape(ROWS, -1, COLUMNS // 2)
    assert np.all(y == y[:, :1])
    assert_share(y[:, 0] == 0, 0.001)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("name", "setting", "value"), [("Noise", 1.0, 0.0), ("Dropout", 0.5, 1.0)])
def test_noise_is_normal(name, setting, value, half):
    layer = getattr(layers, f"Gaussian{name}")(setting, seed=1, dtype=f"mixed_{half}")
    noise = drawn(layer, half, value=value) - value
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * noise.size)
    assert np.abs(noise).max() > 4.2  # 27 of a million normal numbers are beyond
    assert len(np.unique(noise)) > {"float16": 8000, "bfloat16": 1500}[half]


@full_on("jax", "torch")
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_masks_of_a_cell_drop_the_share_that_its_rate_says(name):
    cls, rate = getattr(layers, name), 0.001
    cell = cls(3, dropout=rate, recurrent_dropout=rate, seed=1, dtype="mixed_bfloat16")
    x = ops.ones((ROWS, COLUMNS // 4), "bfloat16")
    masks = [cell.get_dropout_mask(x)[0], cell.get_recurrent_dropout_mask(x)[0]]
    assert {keras.backend.standardize_dtype(mask.dtype) for mask in masks} == {"bfloat16"}
    assert_share(np.stack([numpy(mask) for mask in masks]) == 0, rate)


@pytest.mark.parametrize("name", ["Dropout", "GaussianDropout", "GaussianNoise"])
def test_nothing_is_drawn_at_a_rate_of_0_or_where_nothing_trains(name):
    x = np.arange(6.0).reshape(2, 3)
    for setting, training in ((0.0, True), (0.5, False)):
        layer = getattr(layers, name)(setting, dtype="mixed_float16")
        np.testing.assert_array_equal(numpy(layer(x, training=training)), x)
