"""Every stock layer with a counterpart in kerasmp is replaced by it in place, and back."""

import keras
import numpy as np
import pytest
from helpers.flattened import flatten_layers
from helpers.layer_cases import CASES, case
from helpers.marks import few
from helpers.replaced_layers import (
    COUNTERPARTS,
    assert_state,
    flags,
    numpy,
    replace_layers,
    state,
    stock_left,
)

import kerasmp as mp

layers = keras.layers
# Looked up: a new class of ours is held to what is below.
STOCK = {ours.__name__: stock for stock, ours in COUNTERPARTS.items()}
STEPS = (2, 5, 6)
CELLS = {
    name: case(STEPS, make=lambda cls=cls: {"cell": cls(3)})
    for name, cls in STOCK.items()
    if name.endswith("Cell")
}
# Instead of the case of one layer: layers with parts, or with other paths through the code.
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
# One for each way in which a class is replaced. On JAX only those with other code.
MECHANISMS = {"Dense-silu", "PReLU"}
if keras.backend.backend() != "jax":
    MECHANISMS |= {
        "ActivityRegularization",
        "Attention",
        "BatchNormalization",
        "Bidirectional",
        "Conv2D-gelu",
        "LSTMCell",
        "MultiHeadAttention",
        "Normalization",
        "Normalization-adapted",
        "Softmax",
        "SpectralNormalization",
    }


def inputs_of(example):
    return [keras.Input(batch_shape=shape) for shape in example.shapes]


def model_of(layer, example):
    """Return a model in which the layer is not the last one, which is always in float32."""
    symbols = inputs_of(example)
    model = keras.Model(symbols, layers.Rescaling(1.0)(example.call(layer, *symbols)))
    random = np.random.default_rng(1)
    for variable in model.variables:
        if keras.backend.is_float_dtype(variable.dtype):
            value = numpy(variable)
            # Variances are not negative; a bias of 0 would hide errors.
            variable.assign(value + np.abs(random.normal(size=value.shape)) * 0.1)
    finalize(layer)
    return model


def finalize(layer):
    """Make a Normalization use the values assigned to its variables."""
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


def twin(model, example, dtype):
    """Return a model with a layer from the kerasmp constructor, and the same weights."""
    layer = model.layers[-2]
    config = layer.get_config()
    with mp.policy_scope(dtype):
        again = type(layer).from_config(config)
    other = model_of(again, example)
    other.set_weights(model.get_weights())
    finalize(again)
    return other


def assert_made_alike(model, other):
    """Assert that the constructor sets the same attributes as a replacement."""
    for layer, made in zip(flatten_layers(model)[1:], flatten_layers(other)[1:], strict=True):
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
        assert flags(layer) == flags(made)


def symbols_of(model):
    return [layer.output.dtype for layer in model.layers[:-1]]


# ------------------------------------------------------------------------------- for every class


@pytest.mark.parametrize("name", few(EVERY, MECHANISMS))
def test_each_stock_layer_becomes_its_counterpart_is_saved_and_restored(name, tmp_path):
    cls, example = EVERY[name]
    model = build(cls, example)
    weights, stock, before = kept(model), outputs(model, example), state(model)
    classes = [type(layer).__name__ for layer in flatten_layers(model)]

    # After an error it is what it was.
    with pytest.raises(mp.errors.PolicyError, match="not match any layer path"):
        replace_layers(model, "mixed_float16", rules={"nowhere": "float32"})
    assert_state(model, before)

    # In float32, and a second conversion replaces nothing.
    report, names = replace_layers(model)
    assert names
    assert not stock_left(model)
    ours = [type(layer) for layer in flatten_layers(model)]
    found = [old for old, new in zip(classes, ours, strict=True) if is_ours(new)]
    assert sorted(found) == names
    assert_kept(model, weights)
    other = twin(model, example, "float32")
    np.testing.assert_array_equal(outputs(model, example), outputs(other, example))
    np.testing.assert_allclose(outputs(model, example), stock, rtol=1e-5, atol=1e-5)
    assert_made_alike(model, other)
    once = state(model)
    again, names = replace_layers(model)
    assert not names
    again.restore()
    assert_state(model, once)

    # Under a mixed policy.
    mixed = mp.convert(model, "mixed_float16")
    assert model.layers[-2].dtype_policy.name == "mixed_float16"
    other = twin(model, example, "mixed_float16")
    mp.convert(other, "mixed_float16")
    found = outputs(model, example)
    np.testing.assert_array_equal(found, outputs(other, example))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in flatten_layers(loaded)[1:]] == ours[1:]
    np.testing.assert_array_equal(outputs(loaded, example), found)

    mixed.restore()
    report.restore()
    assert_kept(model, weights)
    assert_state(model, before)
    np.testing.assert_array_equal(outputs(model, example), stock)


def is_ours(cls):
    return cls.__module__.startswith("kerasmp.layers")


@pytest.mark.parametrize("name", sorted(MECHANISMS))
def test_layers_of_a_model_already_in_float16_are_replaced_too(name):
    cls, example = EVERY[name]
    with mp.policy_scope("mixed_float16"):
        model = build(cls, example, "mixed_float16")
    before, stock = state(model), symbols_of(model)
    report, _ = replace_layers(model, "mixed_float16", rules=None)
    with mp.policy_scope("mixed_float16"):
        other = twin(model, example, "mixed_float16")
    np.testing.assert_array_equal(outputs(model, example), outputs(other, example))
    report.restore()
    assert_state(model, before)
    assert symbols_of(model) == stock
