"""Fails if Keras calls layers in another way than `watch_calls` sees."""

import threading

import keras
import numpy as np
import pytest

from kerasmp.backend.layer_calls import takes_training, watch_calls

layers = keras.layers
X = np.ones((2, 3), "float32")


def watching(seen):
    def watcher(call, layer, args, kwargs):
        seen.append((layer.name, keras.backend.standardize_dtype(args[0].dtype)))
        return call(layer, *args, **kwargs)

    return watcher


class Outer(layers.Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.inner = layers.Identity(name="inner", dtype="mixed_float16")

    def call(self, inputs):
        return self.inner(inputs)


def test_inputs_are_seen_before_the_layer_casts_them():
    seen = []
    with watch_calls(watching(seen)):
        Outer(name="outer", dtype="float32")(keras.ops.convert_to_tensor(X))
    assert seen == [("outer", "float32")]  # what the watcher calls is not watched


def test_a_watcher_that_asks_for_it_sees_layers_inside():
    seen = []

    def inside(call, layer, args, kwargs):
        with watch_calls(watching(seen)):
            return call(layer, *args, **kwargs)

    with watch_calls(inside):
        Outer(name="outer", dtype="float32")(keras.ops.convert_to_tensor(X))
    assert seen == [("inner", "float32")]


def test_a_stateless_call_is_seen_once_and_returns_its_state():
    seen, layer = [], layers.BatchNormalization(name="norm")
    layer.build(X.shape)
    state = [[v.value for v in group] for group in (layer.weights[:2], layer.weights[2:])]
    with watch_calls(watching(seen)):
        outputs, others = layer.stateless_call(*state, keras.ops.convert_to_tensor(X))
    assert seen == [("norm", "float32")]
    assert keras.ops.shape(outputs) == (2, 3)
    assert len(others) == 2


def test_what_the_watcher_returns_is_what_the_caller_gets():
    with watch_calls(lambda *_: "another"):
        assert layers.Identity()(X) == "another"
        with watch_calls(None):
            assert layers.Identity()(X) is not None
            assert keras.ops.shape(layers.Identity()(X)) == (2, 3)


def test_another_thread_is_not_watched():
    seen, outputs = [], []
    with watch_calls(watching(seen)):
        thread = threading.Thread(target=lambda: outputs.append(layers.Identity()(X)))
        thread.start()
        thread.join()
    assert len(outputs) == 1
    assert seen == []


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_original_is_back_afterwards(error):
    original = keras.Layer.__call__

    def watcher(call, layer, args, kwargs):
        if error is not None:
            raise error
        return call(layer, *args, **kwargs)

    try:
        with watch_calls(watcher), watch_calls(watcher):
            assert keras.Layer.__call__ is not original
            layers.Identity()(X)
    except RuntimeError:
        assert error is not None
    assert keras.Layer.__call__ is original


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Dense(1, name="seen"),
        # They prepare their arguments in a `__call__` of their own.
        lambda: layers.LSTM(1, name="seen"),
        lambda: layers.Bidirectional(layers.LSTM(1), name="seen"),
        lambda: layers.Rescaling(2.0, name="seen"),
        lambda: keras.Sequential([layers.Dense(1)], name="seen"),
    ],
)
def test_layers_of_each_kind_are_seen(layer):
    seen = []
    with watch_calls(watching(seen)):
        layer()(keras.ops.ones((2, 3, 4)))
    assert seen == [("seen", "float32")]


def test_takes_training_is_about_the_call():
    assert takes_training(layers.Dropout(0.5))
    assert not takes_training(layers.Flatten())
