"""Which layers of a model are turned into ours, what becomes of activations and heads, and why."""

import contextlib

import keras
import numpy as np
import pytest
from helpers.turned_layers import assert_state, numpy, state, stock_left

import kerasmp as mp
from kerasmp.backend.keras_private import autocasts, own_variables
from kerasmp.layers.from_stock import safe_activations, turn_to_safe

layers = keras.layers
BACKEND = keras.backend.backend()

# ------------------------------------------------------------------------------------ the places


class Doubled(layers.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training)


class OwnLSTM(layers.LSTM):
    pass


class Block(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Dense(4, activation="gelu"), layers.Softmax()]
        self.named = {"last": layers.Dense(4)}

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return self.named["last"](inputs)


def deep():
    inputs = keras.Input((6, 4))
    inner = keras.Sequential([keras.Input((6, 4)), layers.Dense(4), layers.Softmax()])
    shared = layers.Dense(4, activation="gelu")
    x = Block()(shared(shared(inner(inputs))))
    x = layers.RNN([layers.LSTMCell(3), layers.GRUCell(3), layers.SimpleRNNCell(2)])(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def test_every_depth_is_reached_and_shared_layers_are_turned_once():
    model = deep()
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    stock = numpy(model(x))
    before = state(model)
    with contextlib.ExitStack() as undo:
        names = turn_to_safe(model, undo)
        assert sorted(names.values()) == sorted(
            ["Dense"] * 5 + ["Softmax"] * 2 + ["RNN", "LSTMCell", "GRUCell"]
        )
        assert not stock_left(model)
        np.testing.assert_allclose(numpy(model(x)), stock, rtol=1e-5, atol=1e-6)
        report = mp.convert(model)
        np.testing.assert_allclose(numpy(model(x)), stock, rtol=0.05, atol=1e-2)
        report.restore()
    assert_state(model, before)
    np.testing.assert_array_equal(numpy(model(x)), stock)


def test_a_users_subclass_is_left_alone_and_so_is_what_its_base_makes():
    model = keras.Sequential(
        [keras.Input((6, 4)), Doubled(4, activation="gelu"), OwnLSTM(3), layers.ReLU()]
    )
    before = state(model)
    with contextlib.ExitStack() as undo:
        assert turn_to_safe(model, undo) == {}
        assert_state(model, before)


def test_what_keeps_its_dtype_keeps_its_class():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Softmax()])
    model = keras.Sequential([keras.Input((4,)), mp.layers.WithDtype(inner), layers.ReLU()])
    with contextlib.ExitStack() as undo:
        assert turn_to_safe(model, undo) == {}


def test_what_is_quantised_is_left_alone():
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, activation="gelu"), layers.Softmax(), layers.Dense(2)]
    )
    model.layers[0].quantize("int8")
    with contextlib.ExitStack() as undo:
        names = turn_to_safe(model, undo)
        assert sorted(names.values()) == ["Dense", "Softmax"]
        assert type(model.layers[0]) is layers.Dense
        assert model.layers[0].activation is keras.activations.gelu


def test_lora_goes_on():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.ReLU(), layers.Dense(2)])
    for layer in (model.layers[0], model.layers[2]):
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    stock = numpy(model(x))
    before = state(model)
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        np.testing.assert_allclose(numpy(model(x)), stock, rtol=1e-6)
        assert not any(map(autocasts, own_variables(model.layers[2])))
        mp.convert(model).restore()
    assert_state(model, before)


def test_a_variable_that_another_layer_holds_is_cast_as_before():
    class Tied(layers.Layer):
        def __init__(self, other):
            super().__init__()
            self.kernel = other.kernel

        def call(self, inputs):
            return keras.ops.matmul(inputs, self.kernel)

    dense = layers.Dense(4)
    inputs = keras.Input((4,))
    x = dense(inputs)
    model = keras.Model(inputs, [dense(Tied(dense)(x)), x])
    x = np.ones((1, 4), "float32")
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        assert type(dense) is mp.layers.DenseHead
        assert autocasts(dense.kernel)
        assert not autocasts(dense.bias)
        mp.convert(model).restore()
        mp.convert(model)
        assert np.isfinite(numpy(model(x)[0])).all()


# ----------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("stock", "ours"), safe_activations(), ids=lambda f: f"{f.__module__}.{f.__name__}"
)
def test_our_activation_is_the_stock_one_in_float32(stock, ours):
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32") * 3
    tensor = keras.ops.convert_to_tensor(x)
    np.testing.assert_allclose(numpy(ours(tensor)), numpy(stock(tensor)), rtol=2e-6, atol=1e-6)


def test_activations_that_are_others_or_unknown_are_left_alone():
    pairs = {(stock.__module__.split(".")[2], stock.__name__) for stock, _ in safe_activations()}
    assert ("ops", "gelu") not in pairs  # its default is the approximation
    assert {("activations", name) for name in ("gelu", "silu", "mish", "tanh", "softmax")} <= pairs

    def mine(x):
        return x

    functions = [mine, "relu", keras.ops.gelu, None, layers.ELU()]
    model = keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, activation=f) for f in functions), layers.ReLU()]
    )
    before = [layer.activation for layer in model.layers[:-1]]
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        assert [layer.activation for layer in model.layers[:-1]] == before


@pytest.mark.parametrize("name", ["gelu", "softmax", "swish", "mish", "hard_silu", "squareplus"])
def test_activations_inside_are_ours_and_are_loaded(name, tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    dense = layers.Dense(5, activation=name)
    model = keras.Sequential([keras.Input((6,)), dense, layers.ReLU()])
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        assert dense.activation is getattr(mp.ops, name)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.layers[0].activation is getattr(mp.ops, name)
        np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))
    assert dense.activation is getattr(keras.activations, name)


def test_recurrent_activations_stay_since_keras_knows_its_own_cudnn_by_them():
    model = keras.Sequential([keras.Input((5, 6)), layers.LSTM(3), layers.ReLU()])
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        cell = model.layers[0].cell
        assert type(cell) is mp.layers.LSTMCell
        assert cell.activation is keras.activations.tanh
        assert cell.recurrent_activation is keras.activations.sigmoid


# ----------------------------------------------------------------------------------------- heads


def classifier(activation="softmax"):
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(4, activation="gelu"), layers.Dense(3, activation)]
    )


def test_the_dense_that_makes_the_outputs_becomes_a_head(tmp_path):
    model = classifier()
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    stock = numpy(model(x))
    before = state(model)
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        body, head = model.layers
        assert type(body) is mp.layers.Dense
        assert type(head) is mp.layers.DenseHead
        assert head.activation is keras.activations.softmax  # losses go by its logits
        assert not any(map(autocasts, own_variables(head)))
        np.testing.assert_allclose(numpy(model(x)), stock, rtol=1e-6)
        report = mp.convert(model)
        assert head.compute_dtype == "float16"
        assert model.outputs[0].dtype == "float32"
        found = numpy(model(x))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, stock, rtol=1e-2)
        assert not np.array_equal(found, found.astype("float16"))
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.layers[1]) is mp.layers.DenseHead
        np.testing.assert_array_equal(numpy(loaded(x)), found)
        report.restore()
    assert_state(model, before)
    np.testing.assert_array_equal(numpy(model(x)), stock)


def test_symbols_of_a_head_in_a_float16_model_say_float32_and_go_back():
    with mp.policy_scope("mixed_float16"):
        model = classifier()
    assert model.outputs[0].dtype == "float16"
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        assert model.outputs[0].dtype == "float32"
        assert numpy(model(np.ones((1, 6)))).dtype == np.float32
    assert model.outputs[0].dtype == "float16"
    assert keras.backend.standardize_dtype(model(np.ones((1, 6))).dtype) == "float16"


@keras.saving.register_keras_serializable("safe_layers")
class Net(keras.Model):
    def __init__(self, units=3, **kwargs):
        inputs = keras.Input((6,))
        x = layers.Dense(4, activation="gelu")(inputs)
        super().__init__(inputs, layers.Dense(units)(x), **kwargs)
        self.units = units

    def get_config(self):
        return {"units": self.units}


def test_a_model_that_makes_its_layers_itself_finds_its_weights_in_files(tmp_path):
    model = Net()
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        assert {type(layer) for layer in model.layers[1:]} == {mp.layers.Dense}
        wanted = numpy(model(x))
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(numpy(loaded(x)), wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------- what it mends


def attending():
    inputs = keras.Input((6, 64))
    x = layers.MultiHeadAttention(2, 32)(inputs, inputs)
    return keras.Model(inputs, layers.Dense(2)(x))


def test_attention_of_large_inputs_is_finite():
    x = np.random.default_rng(0).normal(size=(2, 6, 64)).astype("float32") * 2000
    model = attending()
    before = numpy(model(x))
    if BACKEND == "tensorflow":
        report = mp.convert(model, rules=None)
        with np.errstate(all="ignore"):
            assert np.isnan(model.predict(x, verbose=0)).any()
        report.restore()
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        mp.convert(model)
        found = model.predict(x, verbose=0)
        assert {layer.compute_dtype for layer in model.layers} >= {"float16"}
        assert np.isfinite(found).all()
        assert np.linalg.norm(found - before) < 0.02 * np.linalg.norm(before)


def test_it_trains_and_the_optimizer_keeps_its_variables():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="gelu"),
            layers.BatchNormalization(),
            layers.PReLU(),
            layers.Dense(3),
        ]
    )
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    y = np.ones((8, 3), "float32")
    model.compile(mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=2.0**7), "mse")
    model.fit(x, y, verbose=0)
    with contextlib.ExitStack() as undo:
        turn_to_safe(model, undo)
        report = mp.convert(model)
        losses = model.fit(x, y, epochs=20, verbose=0).history["loss"]
        assert losses[-1] < losses[0]
        assert model.optimizer.applied_steps == 21
        report.restore()
    again = model.fit(x, y, verbose=0).history["loss"][0]
    assert again < losses[0]
