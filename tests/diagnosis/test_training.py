"""What lint says of optimizers."""

import keras
import pytest
from helpers.linted import compiled, dense, found, made, only

import kerasmp as mp

layers = keras.layers

# NumPy and JAX say so of the constants that are looked for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


# unscaled


def test_float16_without_scaling_is_an_error():
    model = compiled(made(dense()), "mse", keras.optimizers.SGD())
    assert only(model, "unscaled").severity == "error"


def test_scaled_bfloat16_frozen_not_compiled_and_ours_are_in_peace():
    plain = keras.optimizers.SGD
    assert not found(compiled(made(dense()), "mse"), "unscaled")
    assert not found(made(dense()), "unscaled")
    model = made(dense(), policy="mixed_bfloat16")
    assert not found(compiled(model, "mse", plain()), "unscaled")
    frozen = made(dense())
    frozen.layers[0].trainable = False
    assert not found(compiled(frozen, "mse", plain()), "unscaled")
    assert not found(compiled(made(dense(), module=mp), "mse", plain()), "unscaled")
    ours = made(dense(), module=mp)
    ours.compile("sgd", "mse", auto_scale_loss=False)
    assert found(ours, "unscaled")
