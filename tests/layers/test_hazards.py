"""Every hazard of float16: ours is as accurate as float16 can be, and stock Keras is not."""

import functools

import keras
import pytest
from helpers import gradients, numerics_page
from helpers.hazards import BY_NAME, HAZARDS
from helpers.precision import Measured

from kerasmp import layers

every_hazard = pytest.mark.parametrize("name", BY_NAME)
every_way = pytest.mark.parametrize("way", gradients.WAYS)
FAR = 16  # times the best: too far to be an accident of a version
# Layers that need no entry of their own.
WITHOUT = {
    "GRUCell": "within GRU",
    "LSTMCell": "within LSTM",
    "RNN": "LSTM and GRU are RNNs of their cells",
    "WithDtype": "gives a layer a dtype",
}


@functools.lru_cache(1)
def measured(name, way):
    return Measured(BY_NAME[name], way)


def recorded():
    """Return the hazards and ways in which stock Keras was found far off, with the tensors."""
    entry = numerics_page.read().get(keras.backend.backend(), {"rows": []})
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


@every_hazard
@every_way
def test_ours_is_near_the_best(name, way):
    """Forward and gradients, on the hazard and on ordinary inputs of several magnitudes."""
    found = measured(name, way)
    for arrays in (found.arrays, *found.hazard.ordinary_inputs()):
        forward, backward = found.rows(arrays, ["ours"])
        assert forward
        assert backward
        assert not [row for row in [*forward, *backward] if not row.good("ours")]


@pytest.mark.keras("3.15")
@pytest.mark.parametrize(
    ("name", "way"), [pytest.param(name, way, id=f"{name}-{way}") for name, way in recorded()]
)
def test_stock_keras_is_as_far_off_as_the_page_says(name, way):
    forward, backward = measured(name, way).rows(contestants=["stock"])
    far = {row.tensor for row in [*forward, *backward] if not row.good("stock")}
    # One of them: where small errors grow large, how far off each is hangs on the machine.
    assert far & recorded()[name, way]
