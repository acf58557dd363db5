"""A call sets nothing that another thread could see: no attribute of a layer, a model or Keras."""

import contextlib
import sys
import threading

import keras
import keras.src.backend as keras_backend
import numpy as np
import pytest
from helpers.flattened import flatten_layers
from helpers.float16 import numpy_of
from helpers.layer_cases import CASES, OURS
from helpers.marks import few, full, full_on
from keras import layers, ops

import kerasmp as mp

# One for each mechanism of kerasmp layers that has set something, or might.
MECHANISMS = ["Dense", "Conv2D", "LSTM", "SpectralNormalization"]
if keras.backend.backend() == "jax":  # which compiles each
    MECHANISMS = MECHANISMS[:1]
THREADS = 4

_MISSING = object()
_PACKAGES = {"keras", "kerasmp"}


@contextlib.contextmanager
def changes(*layers):
    """Yield a set that collects changes as "Class.attribute" within the context.

    The layers, all layers inside them, their classes and regularizers, and the functions of Keras's
    backend are compared whenever a function of Keras or kerasmp begins or ends in this thread.
    """
    watched = [(name, live, dict(live)) for name, live in _held(layers)]
    found = set()

    def look():
        for name, live, before in watched:
            if not _same(live, before):
                for key in {*live, *before}:
                    if live.get(key, _MISSING) is not before.get(key, _MISSING):
                        found.add(f"{name}.{key}")

    def profile(frame, event, _):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if event in {"call", "return"} and package in _PACKAGES:
            look()

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)
    look()


def _held(layers):
    everything = {id(part): part for layer in layers for part in flatten_layers(layer)}.values()
    for part in everything:
        yield type(part).__name__, vars(part)
        regularizer = getattr(part, "activity_regularizer", None)
        if hasattr(regularizer, "__dict__"):
            yield type(regularizer).__name__, vars(regularizer)
    classes = {cls for part in everything for cls in type(part).__mro__ if cls is not object}
    for of_keras in (*classes, keras_backend.AutocastScope):
        yield of_keras.__name__, vars(of_keras)
    for module in (keras_backend, keras_backend.numpy, keras_backend.nn, keras_backend.core):
        yield module.__name__, vars(module)


def _same(live, before):
    with contextlib.suppress(Exception):  # arrays have no single truth value for ==
        return live == before
    return False


def called(cls, case, **arguments):
    """Return what a second call of a layer sets; at the first one Keras sets some attributes."""
    layer = case.make(cls, "mixed_float16")
    inputs = [ops.convert_to_tensor(x) for x in case.inputs()]
    case.call(layer, *inputs, **arguments)
    with changes(layer) as found:
        case.call(layer, *inputs, **arguments)
    return found


@pytest.mark.parametrize("name", few(OURS, MECHANISMS))
def test_a_layer_sets_no_attribute_that_stock_keras_does_not(name):
    stock = getattr(keras.layers, name, None)
    found = called(OURS[name], CASES[name])
    assert found <= (called(stock, CASES[name]) if stock and found else set())


def model_of(dtype="float32"):
    inputs = keras.Input((6, 3))
    x = layers.Conv1D(4, 3, padding="same", activation="gelu", dtype=dtype)(inputs)
    x = layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d", dtype=dtype)(x)
    outputs = layers.Dense(2, activation="tanh", activity_regularizer="l2", dtype=dtype)(x)
    return keras.Model(inputs, outputs)


def converted():
    model = model_of()
    mp.convert(model, rules=None, safe_layers=True)
    return model


X = np.random.default_rng(0).normal(size=(2, 6, 3)).astype("float32")


def stepped(model):
    """Return what the second step of each kind sets."""
    model.compile("sgd", "mse", run_eagerly=True)
    steps = {
        "call": lambda: model(X),
        "predict": lambda: model.predict_on_batch(X),
        "train": lambda: model.train_on_batch(X, X[:, :, :2]),
    }
    found = {}
    for name, step in steps.items():
        step()
        with changes(model) as found[name]:
            step()
    return found


def attributes(names):
    return {name.partition(".")[2] for name in names}


def adopted():
    return mp.Model.from_keras(model_of("mixed_float16"))


@full_on("jax")
@pytest.mark.parametrize("make", [converted, full(adopted)])
def test_a_model_sets_no_attribute_that_stock_keras_does_not(make):
    """Keras itself sets attributes in a step; optimizer and metrics are not compared."""
    found = stepped(make())
    assert found["call"] == set()
    stock = stepped(model_of())
    for name in found:
        assert attributes(found[name]) <= attributes(stock[name]), name


class Sub(mp.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, activity_regularizer="l2", dtype="mixed_float16")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)


def test_layers_added_late_or_made_in_build_are_adopted_before_the_first_call():
    late = mp.Sequential([keras.Input((3,))])
    late.add(layers.Dense(2, activity_regularizer="l2", dtype="mixed_float16"))
    sub = Sub()
    sub.build((None, 3))
    for model in (late, sub):
        with changes(model) as found:
            model(X[:, 0])
        assert attributes(found) <= {"_called", "_parent_path"}


# ------------------------------------------------------------------------------------- threads


def in_threads(work, calls):
    """Return the results of each thread; threads start together and switch often."""
    start = threading.Barrier(THREADS)
    results, errors = [], []

    def run(number):
        try:
            start.wait()
            results.extend(work(number) for _ in range(calls))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is to show it
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
    return results


SHARED = {
    "Dense": lambda: mp.layers.Dense(4, activation="gelu", dtype="mixed_float16"),
    "Conv1D": lambda: mp.layers.Conv1D(4, 3, activation="gelu", dtype="mixed_float16"),
    "LSTM": lambda: mp.layers.LSTM(4, dtype="mixed_float16"),
    "convert": converted,
}


@full_on("jax")
@pytest.mark.parametrize("name", SHARED)
def test_threads_that_share_a_model_get_what_one_thread_gets(name):
    layer = SHARED[name]()
    x = ops.convert_to_tensor(X)
    wanted = numpy_of(layer(x))
    config = layer.get_config()
    for outputs in in_threads(lambda _: numpy_of(layer(x)), 5 if name == "LSTM" else 25):
        np.testing.assert_array_equal(outputs, wanted)
    assert layer.get_config() == config


def test_penalties_of_a_layer_that_models_share_see_float32_in_all_threads():
    seen = []

    def penalty(outputs):
        seen.append(keras.backend.standardize_dtype(outputs.dtype))
        return ops.sum(outputs)

    dense = layers.Dense(4, activity_regularizer=penalty, dtype="mixed_float16")
    models = [mp.Sequential([keras.Input((6, 3)), dense]) for _ in range(2)]
    seen.clear()
    in_threads(lambda number: models[number % 2](X), 25)
    assert seen == ["float32"] * THREADS * 25
