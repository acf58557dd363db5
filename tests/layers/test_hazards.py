"""Every hazard of float16: ours is as accurate as float16 can be, and stock Keras is not."""

import keras
import pytest
from helpers import gradients, measurements, numerics_page
from helpers.hazards import BY_NAME, HAZARDS
from helpers.marks import few
from helpers.precision import Measured

from kerasmp import layers

FAR = 16  # times the best: too far to be an accident of a version
# On JAX each takes seconds to compile: one for each way in which ours are made.
JAX = keras.backend.backend() == "jax"
MECHANISMS = {
    "MultiHeadAttention, with scores, inputs of std 0.5, mean 30",
    "Attention, nothing unmasked, negative scores",
    "ActivityRegularization",
    "Normalization, a mean of 70000",
    "UnitNormalization, a row of zeros",
    "AveragePooling1D(2048), a mean of 40",
    "GlobalAveragePooling1D with a mask, 2000 steps, a mean of 100",
    'Activation("gelu"), from -30 to 30, upstream gradients of std 4096',
    "Dense, 10000 positions",
    "DepthwiseConv1D, 6272 positions",
    "SpectralNormalization, the kernel after a training step",
    "Softmax with a mask, logits of -40000",
    "AdditiveAttention, its scale",
    "PReLU, its slope for 112 x 112 positions",
    "GRU, 64 steps",
}
# They compile for 9 and 6 s; contracts/test_every_layer takes a step with an LSTM and attention.
LONG = {"GRU, 64 steps", "MultiHeadAttention, with scores, inputs of std 0.5, mean 30"}
# Layers that need no entry of their own.
WITHOUT = {
    "Dropout": "random, as the next: layers/test_noise.py",
    "Embedding": "only its gradient can be wrong, which is in test_gradient_sums.py",
    "GaussianDropout": "random",
    "GaussianNoise": "random",
    "GRUCell": "within GRU",
    "LSTMCell": "within LSTM",
    "Masking": "its mask is right or not: layers/test_masking.py",
    "RNN": "LSTM and GRU are RNNs of their cells",
    "SpatialDropout1D": "random",
    "SpatialDropout2D": "random",
    "SpatialDropout3D": "random",
    "WithDtype": "gives a layer a dtype",
}


def recorded():
    """Return the hazards and ways in which stock Keras was found far off, with the tensors."""
    entry = measurements.read(numerics_page.DATA).get(keras.backend.backend(), {"rows": []})
    far = {}
    for row in entry["rows"]:
        if row["inputs"] == numerics_page.HAZARD and numerics_page.ratio(row, "stock") > FAR:
            far.setdefault((row["name"], row["way"]), set()).add(row["tensor"])
    return far


def test_names_are_told_apart():
    assert len(BY_NAME) == len(HAZARDS)


def test_every_layer_of_ours_is_measured():
    measured = {hazard.ours or hazard.layer for hazard in HAZARDS if not hazard.rules}
    assert measured | set(WITHOUT) == set(layers.__all__)


def assert_near_the_best(measured, arrays):
    forward, backward = measured.rows(arrays, ["ours"])
    assert forward
    assert backward
    assert not [row for row in [*forward, *backward] if not row.good("ours")]


@pytest.mark.parametrize("name", few(BY_NAME, MECHANISMS - LONG, where=JAX))
def test_ours_is_near_the_best(name):
    """Forward and gradients, by what is quickest; JAX rounds otherwise where it optimises less."""
    measured = Measured(BY_NAME[name], "jit" if JAX else "quick")
    assert_near_the_best(measured, measured.arrays)


@pytest.mark.full
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("way", gradients.WAYS)
def test_so_it_is_in_every_way_and_on_ordinary_inputs_of_several_magnitudes(name, way):
    measured = Measured(BY_NAME[name], way)
    for arrays in (measured.arrays, *measured.hazard.ordinary_inputs()):
        assert_near_the_best(measured, arrays)


@pytest.mark.full
@pytest.mark.keras("3.15")
@pytest.mark.parametrize(
    ("name", "way"), [pytest.param(name, way, id=f"{name}-{way}") for name, way in recorded()]
)
def test_stock_keras_is_as_far_off_as_the_page_says(name, way):
    forward, backward = Measured(BY_NAME[name], way).rows(contestants=["stock"])
    far = {row.tensor for row in [*forward, *backward] if not row.good("stock")}
    # One of them: where small errors grow large, how far off each is hangs on the machine.
    assert far & recorded()[name, way]
