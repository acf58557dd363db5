"""Files for stock Keras: they load without kerasmp, or saving is refused."""

import keras
import numpy as np
import pytest
from helpers import converted, processes, stock_only
from helpers.marks import full, full_on, marks_on

import kerasmp as mp

pytestmark = marks_on("jax", "oldest")

layers = keras.layers
ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)


@pytest.fixture(scope="session")
def stock_process():
    """Return `call` of a process that does not import kerasmp."""
    kept = processes.Kept()
    yield kept.call
    kept.close()


@full_on("torch")
@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("nested", "mixed_bfloat16"),
        full("nested", "float32"),
        full("recurrent", "mixed_bfloat16"),
        full("recurrent", "float32"),
    ],
)
def test_stock_keras_loads_it_and_computes_the_same(kind, policy, tmp_path, stock_process):
    model = converted.KINDS[kind]()
    model.compile("adam", "mse")
    mp.convert(model)
    model.fit(converted.X, converted.Y, verbose=0)
    path = tmp_path / "model.keras"
    mp.save_for_stock_keras(model, path)
    dtypes, outputs = stock_process("helpers.stock_only:load", path=str(path), policy=policy)
    assert dtypes == stock_only.dtypes_of(model)
    wanted = keras.ops.convert_to_numpy(model(converted.X)).astype("float64")
    np.testing.assert_array_equal(np.asarray(outputs), wanted)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)  # and the model is unchanged


@pytest.mark.parametrize("kind", ["attention", "subclassed"])
def test_parts_that_keras_would_load_differently_are_named(kind, tmp_path):
    model = converted.KINDS[kind]()
    mp.convert(model)
    # A user-defined class saves nothing of its parts, whose policy is then the global one.
    named = {"attention": 'query" .* "float32", loaded', "subclassed": "attention"}[kind]
    with pytest.raises(mp.errors.PolicyError, match=named):
        mp.save_for_stock_keras(model, tmp_path / "model.keras")
    assert not (tmp_path / "model.keras").exists()
    if kind == "attention":
        mp.convert(model, rules=["safe", dict.fromkeys(ATTENTION, "float32")])
        mp.save_for_stock_keras(model, tmp_path / "model.keras")


def test_kerasmp_layers_and_output_dtypes_are_named(tmp_path):
    path = tmp_path / "model.keras"
    model = keras.Sequential([keras.Input((4,)), mp.layers.DenseHead(2, name="head")])
    with pytest.raises(mp.errors.PolicyError, match='head", a DenseHead'):
        mp.save_for_stock_keras(model, path)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    mp.convert(model, "compute=float16,output=float32", rules=None)
    with pytest.raises(mp.errors.PolicyError, match="output=float32"):
        mp.save_for_stock_keras(model, path)
    with pytest.raises(mp.errors.ArgumentTypeError, match="a Dense"):
        mp.save_for_stock_keras(layers.Dense(2), path)
    assert not path.exists()


@pytest.mark.backend("tensorflow")  # lookup layers need it
def test_vocabularies_are_saved_and_optimizers_are_not(tmp_path):
    lookup = layers.IntegerLookup(dtype="int64")
    lookup.adapt(np.array([7, 9, 9]))
    inputs = keras.Input((1,), dtype="int64")
    outputs = layers.Dense(2)(layers.Flatten()(layers.Embedding(3, 4)(lookup(inputs))))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse")
    x = np.array([[9], [7], [1]])
    model.fit(x, np.ones((3, 2)), verbose=0)
    mp.convert(model)
    mp.save_for_stock_keras(model, tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(keras.Model(inputs, outputs))
    assert not loaded.compiled
    assert list(loaded.layers[1].get_vocabulary()) == list(lookup.get_vocabulary())
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    model.fit(x, np.ones((3, 2)), verbose=0)


def test_kerasmp_activations_and_initializers_are_named(tmp_path):
    gelu = layers.Dense(2, activation=mp.ops.gelu, name="second")
    lstm = keras.Sequential([keras.Input((6, 4)), layers.LSTM(2, name="lstm"), layers.Dense(2)])
    mp.convert(lstm, "float16", variables="float16", rules=None)
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(2), gelu])
    nested = keras.Sequential([keras.Input((4,)), inner])
    for model, named in (
        (nested, '"second" with kerasmp>gelu'),
        (lstm, '"lstm" with kerasmp>Orth'),
    ):
        with pytest.raises(mp.errors.PolicyError, match=named):
            mp.save_for_stock_keras(model, tmp_path / "model.keras")
    assert not (tmp_path / "model.keras").exists()


def test_a_class_that_needs_kerasmp_is_refused(tmp_path):
    class Net(mp.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Net()
    model(np.ones((1, 4), "float32"))
    with pytest.raises(mp.errors.PolicyError, match=r"derived from kerasmp\.Model"):
        mp.save_for_stock_keras(model, tmp_path / "model.keras")


@pytest.mark.parametrize("path", ["model.h5", None, 3, b"model.keras"], ids=str)
def test_a_path_that_does_not_end_in_keras_is_refused(path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(mp.errors.ArgumentError, match=r"Expected: a path that ends in \".keras\""):
        mp.save_for_stock_keras(model, path)


def test_a_stock_model_is_saved_as_it_is(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, dtype="mixed_float16")])
    mp.save_for_stock_keras(model, tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.ones((1, 4), "float32")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
