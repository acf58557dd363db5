"""Every hazard of half precision: kerasmp is as accurate as possible, and stock Keras is not."""

import keras
import pytest
from helpers import gradients, measurements, numerics_page
from helpers.float16 import HALVES
from helpers.hazards import BY_NAME, HAZARDS, MEASURED
from helpers.marks import few
from helpers.precision import ALLOWED, Measured

from kerasmp import layers

FAR = 16  # times the best: too far to be a coincidence of one version
# On JAX each takes seconds to compile: one for each mechanism of kerasmp layers.
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
# In bfloat16: those whose sum, rounding or kernel differs from float16.
IN_BFLOAT16 = {
    "ActivityRegularization",
    "UnitNormalization, a row of zeros",
    "AveragePooling1D(2048), a mean of 40",
    "DepthwiseConv1D, 6272 positions",
}
if not JAX:
    IN_BFLOAT16 |= {
        "Attention, 64 features of std 5",
        "Dense, 10000 positions",
        "PReLU, its slope for 112 x 112 positions",
    }
# On other backends all in float16, except those that take seconds.
FLOAT16 = [n for n, half in MEASURED if half == "float16" and not n.startswith("ConvLSTM")]
QUICK = [
    *((name, "float16") for name in (MECHANISMS - LONG if JAX else FLOAT16)),
    *((name, "bfloat16") for name in IN_BFLOAT16),
]
# Layers that need no separate entry.
WITHOUT = {
    "Dropout": "random, as the next: layers/test_noise.py",
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
    """Return the hazards and ways in which stock Keras is far off, with the tensors."""
    data = measurements.read(numerics_page.DATA)
    far = {}
    for half in HALVES:
        entry = data.get(numerics_page.run(keras.backend.backend(), half), {"rows": []})
        for row in entry["rows"]:
            off = numerics_page.ratio(row, "stock")
            if row["inputs"] == numerics_page.HAZARD and off > ALLOWED:
                far.setdefault((row["name"], half, row["way"]), {})[row["tensor"]] = off
    # All their tensors are compared: the error of a single number may be chance.
    return {case: {*tensors} for case, tensors in far.items() if max(tensors.values()) > FAR}


def test_names_are_unique():
    assert len(BY_NAME) == len(HAZARDS)


def test_every_kerasmp_layer_is_measured():
    measured = {hazard.ours or hazard.layer for hazard in HAZARDS if not hazard.rules}
    assert measured | set(WITHOUT) == set(layers.__all__)


def assert_near_the_best(measured, arrays):
    forward, backward = measured.rows(arrays, ["ours"])
    assert forward
    assert backward
    assert not [row for row in [*forward, *backward] if not row.good("ours")]


@pytest.mark.parametrize(("name", "half"), few(MEASURED, QUICK))
def test_the_error_is_within_four_times_the_best(name, half):
    """Outputs and gradients in the fastest way; JAX rounds differently where it optimises less."""
    measured = Measured(BY_NAME[name], "jit" if JAX else "quick", half)
    assert_near_the_best(measured, measured.arrays)


@pytest.mark.full
@pytest.mark.parametrize(("name", "half"), MEASURED)
@pytest.mark.parametrize("way", gradients.WAYS)
def test_the_error_is_within_four_times_the_best_in_every_way_and_on_ordinary_inputs(
    name, half, way
):
    measured = Measured(BY_NAME[name], way, half)
    for arrays in (measured.arrays, *measured.hazard.ordinary_inputs(half)):
        assert_near_the_best(measured, arrays)


@pytest.mark.full
@pytest.mark.keras("3.15")
@pytest.mark.parametrize(
    ("name", "half", "way"), [pytest.param(*case, id="-".join(case)) for case in recorded()]
)
def test_the_error_of_stock_keras_is_that_of_the_page(name, half, way):
    forward, backward = Measured(BY_NAME[name], way, half).rows(contestants=["stock"])
    far = {row.tensor for row in [*forward, *backward] if not row.good("stock")}
    # At least one tensor: where small errors grow, their sizes depend on the machine.
    assert far & recorded()[name, half, way]
