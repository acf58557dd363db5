"""Every stock layer that has a counterpart of ours is turned into it in place, and back."""

import contextlib

import keras
import numpy as np
import pytest
from helpers.layer_cases import CASES, case
from helpers.turned_layers import assert_state, numpy, state, stock_left

import kerasmp as mp
from kerasmp.backend.keras_private import autocasts, flatten_layers, own_variables
from kerasmp.layers import from_stock
from kerasmp.layers.from_stock import stock_to_safe, turn_to_safe

layers = keras.layers
# Looked up: a new class of ours is held to what is below.
STOCK = {ours.__name__: stock for stock, ours in stock_to_safe().items()}
STEPS = (2, 5, 6)
CELLS = {
    name: case(STEPS, make=lambda cls=cls: {"cell": cls(3)})
    for name, cls in STOCK.items()
    if name.endswith("Cell")
}
# In place of the case of one layer: what has parts, or other ways through its code.
MORE = {
    "Conv2D-gelu": (layers.Conv2D, case((2, 8, 8, 3), filters=2, kernel_size=3, activation="gelu")),
    "Dense-silu": (layers.Dense, case(STEPS, units=3, activation="silu")),
    "Bidirectional": (layers.Bidirectional, CASES["Bidirectional"]),
    "LSTM-sequences": (layers.LSTM, case(STEPS, units=3, return_sequences=True)),
    "GRU-before": (layers.GRU, case(STEPS, units=3, reset_after=False)),
    "SeparableConv1D-tanh": (
        layers.SeparableConv1D,
        case((2, 8, 3), filters=2, kernel_size=3, activation="tanh"),
    ),
    "Normalization-adapted": (layers.Normalization, case((4, 6))),
    "TimeDistributed": (layers.TimeDistributed, CASES["TimeDistributed"]),
}
EVERY = {
    name: (layers.RNN, CELLS[name]) if name in CELLS else (cls, CASES[name])
    for name, cls in STOCK.items()
} | MORE
every = pytest.mark.parametrize(("cls", "example"), EVERY.values(), ids=EVERY)


def inputs_of(example):
    return [keras.Input(batch_shape=shape) for shape in example.shapes]


def model_of(layer, example):
    """Return a model in which the layer is not the last: the last is in float32 whatever it is."""
    symbols = inputs_of(example)
    model = keras.Model(symbols, layers.Rescaling(1.0)(example.call(layer, *symbols)))
    random = np.random.default_rng(1)
    for variable in model.variables:
        if keras.backend.is_float_dtype(variable.dtype):
            value = numpy(variable)
            # Variances are not negative; a bias of 0 would prove nothing.
            variable.assign(value + np.abs(random.normal(size=value.shape)) * 0.1)
    finalize(layer)
    return model


def finalize(layer):
    """Let a Normalization see the values that its variables were given."""
    if isinstance(layer, layers.Normalization):
        layer.finalize_state()


def build(cls, example, dtype="float32"):
    return model_of(example.make(cls, dtype), example)


def outputs(model, example):
    return numpy(model(example.inputs()))


def kept(model):
    return [(v, numpy(v)) for v in model.variables]


def assert_kept(model, before):
    for variable, (same, value) in zip(model.variables, before, strict=True):
        assert variable is same
        np.testing.assert_array_equal(numpy(variable), value)


def turned(cls, example):
    with contextlib.ExitStack() as undo:
        model = build(cls, example)
        turn_to_safe(model, undo)
        undo.pop_all()
    return model


def twin(model, example, dtype):
    """Return a model with a layer of ours that our constructor made, and the same weights."""
    layer = model.layers[-2]
    config = layer.get_config()
    with mp.policy_scope(dtype):
        again = type(layer).from_config(config)
    other = model_of(again, example)
    other.set_weights(model.get_weights())
    finalize(again)
    return other


# ------------------------------------------------------------------------------- for every class


def test_every_class_of_ours_with_a_stock_base_is_there():
    bases = {
        name
        for name in mp.layers.__all__
        if issubclass(getattr(mp.layers, name), layers.Layer) and hasattr(layers, name)
    }
    assert len(bases) == len(stock_to_safe())
    assert set(mp.layers.__all__) - bases == {"DenseHead", "WithDtype"}


@every
def test_in_float32_it_is_our_layer(cls, example):
    model = build(cls, example)
    stock = outputs(model, example)
    before = kept(model)
    classes = {id(layer): type(layer).__name__ for layer in flatten_layers(model)}
    with contextlib.ExitStack() as undo:
        names = turn_to_safe(model, undo)
        assert names
        assert names.items() <= classes.items()
        assert not stock_left(model)
        for layer in flatten_layers(model):
            if id(layer) in names:
                assert type(layer).__module__.startswith("kerasmp.layers.")
        assert_kept(model, before)
        found = outputs(model, example)
        np.testing.assert_array_equal(found, outputs(twin(model, example, "float32"), example))
        np.testing.assert_allclose(found, stock, rtol=1e-5, atol=1e-5)


@every
def test_its_attributes_are_those_that_our_constructor_sets(cls, example):
    with contextlib.ExitStack() as undo:
        model = build(cls, example)
        turn_to_safe(model, undo)
        other = twin(model, example, "float32")
        pairs = zip(flatten_layers(model)[1:], flatten_layers(other)[1:], strict=True)
        for layer, made in pairs:
            assert type(layer) is type(made)
            assert vars(layer).keys() == vars(made).keys()
            simple = (bool, int, float, str, tuple, type(None))
            for name, value in vars(made).items():
                mine = vars(layer)[name]
                assert type(mine) is type(value), name
                if isinstance(value, simple) and not name.startswith("_") and name != "name":
                    assert mine == value, name
            for function in ("activation", "recurrent_activation"):
                assert vars(layer).get(function) is vars(made).get(function)
            assert list(layer._call_signature.parameters) == list(made._call_signature.parameters)
            flags = [
                [(v.name, v.dtype, v.trainable, autocasts(v)) for v in own_variables(each)]
                for each in (layer, made)
            ]
            assert flags[0] == flags[1]


@every
def test_under_a_mixed_policy_it_is_our_layer(cls, example):
    model = turned(cls, example)
    mp.convert(model, "mixed_float16", rules="safe")
    assert model.layers[-2].dtype_policy.name == "mixed_float16"
    other = twin(model, example, "mixed_float16")
    mp.convert(other, "mixed_float16", rules="safe")
    np.testing.assert_array_equal(outputs(model, example), outputs(other, example))


@every
def test_a_model_that_computes_in_float16_already_is_turned_too(cls, example):
    with mp.policy_scope("mixed_float16"):
        model = build(cls, example, "mixed_float16")
    before, stock = state(model), symbols_of(model)
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        with mp.policy_scope("mixed_float16"):
            other = twin(model, example, "mixed_float16")
        np.testing.assert_array_equal(outputs(model, example), outputs(other, example))
    assert_state(model, before)
    assert symbols_of(model) == stock


def symbols_of(model):
    return [layer.output.dtype for layer in model.layers[:-1]]


@every
def test_a_saved_one_is_loaded_as_ours(cls, example, tmp_path):
    model = turned(cls, example)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    found = [[type(layer) for layer in flatten_layers(each)] for each in (loaded, model)]
    assert found[0] == found[1]
    np.testing.assert_array_equal(outputs(loaded, example), outputs(model, example))


@every
def test_undone_it_is_what_it_was(cls, example):
    model = build(cls, example)
    weights, predicted = kept(model), outputs(model, example)
    batch = model.predict(example.inputs(), batch_size=64, verbose=0)
    before = state(model)
    with contextlib.ExitStack() as undo:
        assert turn_to_safe(model, undo)
        half = mp.convert(model, "mixed_float16", rules="safe")
        model.predict(example.inputs(), batch_size=64, verbose=0)
        half.restore()
    assert_kept(model, weights)
    assert_state(model, before)
    np.testing.assert_array_equal(outputs(model, example), predicted)
    found = model.predict(example.inputs(), batch_size=64, verbose=0)
    np.testing.assert_array_equal(found, batch)


@every
def test_twice_is_once(cls, example):
    model = build(cls, example)
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        once = state(model)
        assert turn_to_safe(model, undo) == {}
        assert_state(model, once)


@every
def test_an_error_midway_leaves_everything_as_it_was(cls, example, monkeypatch):
    model = build(cls, example)
    before = state(model)
    errors = 0
    while _is_error(model, errors + 1, monkeypatch):
        assert_state(model, before)
        errors += 1
    assert errors >= 2
    assert_state(model, before)


def _is_error(model, last, monkeypatch):
    """Turn and undo, with an error at the change of this number if there are so many."""
    count = 0

    def counted(function):
        def change(*args, **kwargs):
            nonlocal count
            count += 1
            if count == last:
                raise ZeroDivisionError
            return function(*args, **kwargs)

        return change

    changes = ("_set", "_turn", "_activate_safely", "set_autocast", "renew_statistics")
    with contextlib.ExitStack() as undo, monkeypatch.context() as patch:
        for name in changes:
            patch.setattr(from_stock, name, counted(getattr(from_stock, name)))
        try:
            turn_to_safe(model, undo)
        except ZeroDivisionError:
            return True
        finally:
            last = 0  # what undoes is counted too, and shall not fail
        return False
