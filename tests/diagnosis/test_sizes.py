"""Findings of lint about sizes that Tensor Cores are slow with."""

import keras
import pytest
from helpers.linted import X, dense, found, made, only

from kerasmp.diagnosis.sizes import MULTIPLE

layers = keras.layers

pytestmark = pytest.mark.unit


# sizes


def test_sizes_that_miss_multiples_are_hints():
    first, second = found(made(dense(30), dense(8)), "sizes")
    assert first.severity == "hint"
    assert first.reason.startswith("output size 30:")
    assert second.reason.startswith("input size 30:")
    assert MULTIPLE == 8
    assert "batch size 7" in only(made(dense()), "sizes", X[:7]).reason


def test_usual_sizes_give_no_finding():
    def convolution(channels, filters=8, **settings):
        part = lambda: layers.Conv2D(filters, 1, **settings)  # noqa: E731 - as the others
        return made(part, shape=(2, 2, channels), bare=True)

    assert not found(made(dense(16)), "sizes", X)
    assert not found(made(dense(30), policy="float32"), "sizes", X[:7])
    assert not found(convolution(3), "sizes")  # an image
    assert found(convolution(12), "sizes")
    assert not found(made(dense(10), bare=True), "sizes")  # classes
    assert found(made(dense(1001), bare=True), "sizes")
    assert not found(convolution(32, 32, groups=32), "sizes")


def test_transposed_kernels_and_attention_heads_are_read_correctly():
    part = lambda: layers.Conv2DTranspose(12, 1)  # noqa: E731 - as the others
    model = made(part, layers.ReLU, shape=(2, 2, 16))
    assert only(model, "sizes").reason.startswith("output size 12:")
    inputs = keras.Input((4, 8))
    for layer in (layers.MultiHeadAttention(2, 6), layers.GroupQueryAttention(6, 2, 2)):
        layer.dtype_policy = "mixed_float16"
        assert "head size 6" in only(keras.Model(inputs, layer(inputs, inputs)), "sizes").reason


def test_recurrent_layers_and_einsums_are_checked():
    model = made(lambda: layers.LSTM(12, name="lstm"), shape=(4, 16))
    assert only(model, "sizes").reason.startswith("units 12:")
    part = lambda: layers.EinsumDense("abc,cd->abd", (4, 12), name="e")  # noqa: E731 - as the others
    model = made(part, layers.Flatten, shape=(4, 16))
    assert only(model, "sizes").reason.startswith("kernel size 12:")
