"""Which layers of a model are replaced, what becomes of activations and heads, and why."""

import keras
import numpy as np
import pytest
from helpers.flattened import flatten_layers
from helpers.marks import full_on
from helpers.replaced_layers import assert_state, flags, numpy, replace_layers, state, stock_left
from helpers.undoing import take_back

import kerasmp as mp
from kerasmp.layers.from_stock import swap_stock_layers

layers = keras.layers

# ---------------------------------------------------------------------------------- which layers


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


@full_on("jax")
def test_layers_are_replaced_at_every_depth_and_shared_ones_once():
    model = deep()
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    stock = numpy(model(x))
    before = state(model)
    report, names = replace_layers(model)
    assert names == sorted(["Dense"] * 5 + ["Softmax"] * 2 + ["RNN", "LSTMCell", "GRUCell"])
    assert not stock_left(model)
    np.testing.assert_allclose(numpy(model(x)), stock, rtol=1e-5, atol=1e-6)
    mixed = mp.convert(model)
    np.testing.assert_allclose(numpy(model(x)), stock, rtol=0.05, atol=1e-2)
    mixed.restore()
    report.restore()
    assert_state(model, before)
    np.testing.assert_array_equal(numpy(model(x)), stock)


class Failing(list):
    """A list of undo entries that raises after a number of them."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def append(self, what):
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError
        super().append(what)


def test_an_error_before_any_change_leaves_everything_as_it_was():
    inputs = keras.Input((6,))
    x = layers.Dense(4, activation="gelu")(layers.Normalization(mean=1.0, variance=2.0)(inputs))
    x = layers.ActivityRegularization(l2=0.1)(layers.PReLU()(x))
    with mp.policy_scope("mixed_float16"):
        model = keras.Model(inputs, layers.Dense(2)(x))
    before = state(model)
    changes, failed = 0, True
    while failed:
        undo = Failing(changes)
        try:
            swap_stock_layers(model, undo)
            failed = False
        except ZeroDivisionError:
            changes += 1
        take_back(undo)
        assert_state(model, before)
    assert changes >= 10


@full_on("jax")
def test_a_users_subclass_is_left_alone_and_so_is_what_its_base_makes():
    model = keras.Sequential(
        [keras.Input((6, 4)), Doubled(4, activation="gelu"), OwnLSTM(3), layers.ReLU()]
    )
    classes = [type(part) for part in flatten_layers(model)[1:]]
    _, names = replace_layers(model)
    assert not names
    assert [type(part) for part in flatten_layers(model)[1:]] == classes
    assert model.layers[0].activation is keras.activations.gelu


def test_what_keeps_its_dtype_keeps_its_class():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Softmax()])
    model = keras.Sequential([keras.Input((4,)), mp.layers.WithDtype(inner), layers.ReLU()])
    _, names = replace_layers(model)
    assert not names


@full_on("jax")
def test_quantized_layers_are_left_alone():
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, activation="gelu"), layers.Softmax(), layers.Dense(2)]
    )
    model.layers[0].quantize("int8")
    _, names = replace_layers(model)
    assert names == ["Dense", "Softmax"]
    assert type(model.layers[0]) is layers.Dense
    assert model.layers[0].activation is keras.activations.gelu


@full_on("jax")
def test_lora_continues():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.ReLU(), layers.Dense(2)])
    for layer in (model.layers[0], model.layers[2]):
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    stock = numpy(model(x))
    before = state(model)
    report, _ = replace_layers(model)
    np.testing.assert_allclose(numpy(model(x)), stock, rtol=1e-6)
    assert not any(cast for *_, cast in flags(model.layers[2]))
    mp.convert(model).restore()
    report.restore()
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
    replace_layers(model)
    assert type(dense) is mp.layers.DenseHead
    assert [cast for *_, cast in flags(dense)] == [True, False]  # kernel and bias
    mp.convert(model).restore()
    mp.convert(model)
    assert np.isfinite(numpy(model(x)[0])).all()


# ----------------------------------------------------------------------------------- activations


@full_on("jax")
def test_stock_activations_inside_are_replaced_also_in_files(tmp_path):
    names = [name for name in mp.ops.__all__ if hasattr(keras.activations, name)]
    functions = [getattr(keras.activations, name) for name in names]
    # `keras.ops.gelu` is another function: its default is the approximation.
    others = [name for name in names if hasattr(keras.ops, name) and name != "gelu"]
    functions += [getattr(keras.ops, name) for name in others]
    inputs = keras.Input((6,))
    outputs = [
        layers.Dense(2, activation=f, name=f"{i}_{f.__name__}")(inputs)
        for i, f in enumerate(functions)
    ]
    model = keras.Model(inputs, layers.Concatenate()(outputs))
    made = model.layers[1:-1]
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32") * 3
    stock = numpy(model(x))
    report, replaced = replace_layers(model)
    assert replaced == ["Dense"] * len(functions)
    np.testing.assert_allclose(numpy(model(x)), stock, rtol=2e-6, atol=1e-6)
    for dense, name in zip(made, names + others, strict=True):
        assert dense.activation is getattr(mp.ops, name), name
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [x.activation for x in loaded.layers[1:-1]] == [x.activation for x in made]
    report.restore()
    assert [dense.activation for dense in made] == functions


def test_other_activations_are_left_alone():
    def mine(x):
        return x

    functions = [mine, "relu", keras.ops.gelu, None, layers.ELU()]
    model = keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, activation=f) for f in functions), layers.ReLU()]
    )
    before = [layer.activation for layer in model.layers[:-1]]
    replace_layers(model)
    assert [layer.activation for layer in model.layers[:-1]] == before


def test_recurrent_activations_stay_so_that_keras_can_use_cudnn():
    model = keras.Sequential([keras.Input((5, 6)), layers.LSTM(3), layers.ReLU()])
    replace_layers(model)
    cell = model.layers[0].cell
    assert type(cell) is mp.layers.LSTMCell
    assert cell.activation is keras.activations.tanh
    assert cell.recurrent_activation is keras.activations.sigmoid


# ----------------------------------------------------------------------------------------- heads


def classifier(activation="softmax"):
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(4, activation="gelu"), layers.Dense(3, activation)]
    )


@full_on("jax")
def test_the_dense_that_makes_the_outputs_becomes_a_head(tmp_path):
    model = classifier()
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    stock = numpy(model(x))
    before = state(model)
    report, _ = replace_layers(model)
    body, head = model.layers
    assert type(body) is mp.layers.Dense
    assert type(head) is mp.layers.DenseHead
    assert head.activation is keras.activations.softmax  # losses use its logits
    assert not any(cast for *_, cast in flags(head))
    np.testing.assert_allclose(numpy(model(x)), stock, rtol=1e-6)
    mixed = mp.convert(model)
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
    mixed.restore()
    report.restore()
    assert_state(model, before)
    np.testing.assert_array_equal(numpy(model(x)), stock)


@full_on("jax")
def test_symbolic_outputs_of_a_head_are_float32_and_are_restored():
    with mp.policy_scope("mixed_float16"):
        model = classifier()
    assert model.outputs[0].dtype == "float16"
    report, _ = replace_layers(model, "mixed_float16", rules=None)
    assert model.outputs[0].dtype == "float32"
    assert numpy(model(np.ones((1, 6)))).dtype == np.float32
    report.restore()
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
    replace_layers(model)
    assert {type(layer) for layer in model.layers[1:]} == {mp.layers.Dense}
    wanted = numpy(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(numpy(loaded(x)), wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- effects


def attending():
    inputs = keras.Input((6, 64))
    x = layers.MultiHeadAttention(2, 32)(inputs, inputs)
    return keras.Model(inputs, layers.Dense(2)(x))


@full_on("jax")
def test_attention_of_large_inputs_is_finite():
    x = np.random.default_rng(0).normal(size=(2, 6, 64)).astype("float32") * 2000
    model = attending()
    before = numpy(model(x))
    replace_layers(model, "mixed_float16")
    found = numpy(model(x))
    assert {layer.compute_dtype for layer in model.layers} >= {"float16"}
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - before) < 0.02 * np.linalg.norm(before)


@pytest.mark.full
@pytest.mark.backend("tensorflow")
def test_attention_of_large_inputs_is_nan_in_stock_keras():
    model = attending()
    mp.convert(model, rules=None)
    x = np.random.default_rng(0).normal(size=(2, 6, 64)).astype("float32") * 2000
    with np.errstate(all="ignore"):
        assert np.isnan(numpy(model(x))).any()


@full_on("jax")
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
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.03), loss_scale=2.0**7)
    # Otherwise three functions would be compiled for a few small steps.
    model.compile(optimizer, "mse", run_eagerly=keras.backend.backend() != "jax")
    model.fit(x, y, verbose=0)
    report, _ = replace_layers(model, "mixed_float16")
    losses = model.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert model.optimizer is optimizer
    assert optimizer.applied_steps == 5
    report.restore()
    again = model.fit(x, y, verbose=0).history["loss"][0]
    assert again < losses[0]
